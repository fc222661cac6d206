"""A digest of what an adapter computes with, to compare adapters in tests."""

import hashlib

import torch

from loradeck import Adapter


def digest(adapter: Adapter) -> str:
    """Return a sha256 of all keys, dtypes, shapes, scalings and values."""
    content = hashlib.sha256()
    for key, tensor in sorted(adapter.tensors(), key=lambda item: item[0]):
        plain = tensor.detach().cpu().contiguous()
        content.update(f"{key} {plain.dtype} {tuple(plain.shape)}".encode())
        content.update(plain.view(-1).view(torch.uint8).numpy().tobytes())
    content.update(repr(sorted((path, site.scaling) for path, site in adapter.sites.items())).encode())
    return content.hexdigest()
