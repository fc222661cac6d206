"""Keys and values in pages (attention.h), as torch reads and writes them: for rows that the step does not compute."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from loradeck.native.blocks import FORMATS, INPUTS, OUTPUTS, pack, pad, unpack
from loradeck.native.model import NativeModel

PAGE = 32  # tokens
DTYPES = {number: dtype for dtype, number in FORMATS.items()}


def read(model: NativeModel, pages: Sequence[int], layer: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a sequence's first tokens in a layer, each (key heads, tokens, head_dim)."""
    parts = [_views(model, page, layer) for page in pages[: -(-tokens // PAGE)]]
    keys = torch.stack([torch.cat([unpack(k[head]) for k, _ in parts]) for head in range(model.c.key_heads)])
    values = torch.stack([torch.cat([unpack(v[head]).T for _, v in parts]) for head in range(model.c.key_heads)])
    width = model.table.head_dim
    return keys[:, :tokens, :width], values[:, :tokens, :width]


def write(model: NativeModel, pages: Sequence[int], layer: int, start: int, keys: Tensor, values: Tensor) -> None:
    """Write keys and values, each (key heads, tokens, head_dim), of a sequence's tokens from `start` on."""
    stop = start + keys.shape[1]
    for number in range(start // PAGE, -(-stop // PAGE)):
        first, last = max(start, number * PAGE), min(stop, (number + 1) * PAGE)
        inside = slice(first - number * PAGE, last - number * PAGE)
        for matrix, new, turned in zip(_views(model, pages[number], layer), (keys, values), (False, True), strict=True):
            for head in range(model.c.key_heads):
                dense = unpack(matrix[head])
                tokens = dense.T if turned else dense
                tokens[inside] = pad(new[head, first - start : last - start].to(dense.dtype), last - first, model.c.dim)
                matrix[head] = pack(dense)


def _views(model: NativeModel, page: int, layer: int) -> tuple[Tensor, Tensor]:
    """Return views of a page's keys (key heads, 2, D / 32, 512) and values (key heads, D / 16, 1, 512)."""
    dtype, dim = DTYPES[model.c.cache_format], model.c.dim
    count = 2 * model.c.key_heads * PAGE * dim
    address = page + layer * count * dtype.itemsize
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    numbers = torch.frombuffer(memory, dtype=dtype).view(model.c.key_heads, 2, PAGE * dim)
    size = OUTPUTS * INPUTS
    return (
        numbers[:, 0].view(-1, PAGE // OUTPUTS, dim // INPUTS, size),
        numbers[:, 1].view(-1, dim // OUTPUTS, PAGE // INPUTS, size),
    )
