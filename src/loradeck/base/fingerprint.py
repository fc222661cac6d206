"""The fingerprint of a base: a hash that tells models apart in milliseconds."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loradeck.base.quantised import QuantisedWeight
from loradeck.native.quantised import Quantised

SAMPLED = 1024  # values read from each tensor: about a megabyte in all, whatever the size of the base


def fingerprint(model: nn.Module) -> str:
    """Return the sha256, in hex, of the model's class, its parameters' names and shapes, and a sample of their values.

    At most 1024 values of each parameter are read, at an even stride, and rounded to bf16, so one base has the same
    fingerprint in fp32 and bf16 and on any device. Tied weights count once, under their first name.

    It does not notice a change that misses the sample or vanishes in bf16, nor one outside the parameters (a buffer, a
    setting such as the RoPE base). In fp16 the fingerprint may differ, because small weights underflow. It tells bases
    apart; it is no protection against forgery.
    """
    return fingerprint_of(type(model).__name__, sorted(model.named_parameters()))


def fingerprint_of(kind: str, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return the fingerprint of a model of this class with these parameters, sorted by name.

    A quantised weight counts by its values.
    """
    digest = hashlib.sha256(kind.encode())
    for name, parameter in parameters:
        weight = parameter.quantised if isinstance(parameter, QuantisedWeight) else parameter.detach()
        size = weight.shape.numel()
        index = torch.arange(0, size, max(1, size // SAMPLED))[:SAMPLED]
        values = weight.values(index) if isinstance(weight, Quantised) else weight.reshape(-1)[index.to(weight.device)]
        sample = values.to(torch.bfloat16).cpu() + 0  # of two zeros one: blocks have no other
        digest.update(f"\n{name} {list(weight.shape)}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
