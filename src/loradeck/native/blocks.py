"""Weights in blocks of 16 outputs x 32 inputs, as the step reads them (product.h), and back, bit for bit.

A block is [16 pairs of inputs][16 outputs][2], of float32 [16 pairs][2][16 outputs]. What a block lacks is zero.

O outputs   I inputs
"""

import torch
from torch import Tensor

OUTPUTS, INPUTS = 16, 32
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def padded(number: int, step: int) -> int:
    """Return the next multiple of a step."""
    return -(-number // step) * step


def pack(weight: Tensor) -> Tensor:
    """Return a weight (O, I), both multiples of a block's, as blocks (O / 16, I / 32, 512)."""
    outputs, inputs = weight.shape
    rows = _words(weight).unflatten(0, (outputs // OUTPUTS, OUTPUTS))
    columns = rows.transpose(1, 2).clone(memory_format=torch.contiguous_format).view(weight.dtype)
    return columns.view(outputs // OUTPUTS, inputs // INPUTS, OUTPUTS * INPUTS)


def unpack(blocks: Tensor) -> Tensor:
    """Return the weight (O, I) of `pack`."""
    columns = _words(blocks).unflatten(2, (-1, OUTPUTS)).flatten(1, 2)
    rows = columns.transpose(1, 2).clone(memory_format=torch.contiguous_format).view(blocks.dtype)
    return rows.flatten(0, 1)


def _words(tensor: Tensor) -> Tensor:
    """Return a tensor's bits, four bytes a number: a pair of halves is moved as one."""
    whole = tensor.contiguous()
    if whole.storage_offset() * whole.itemsize % 4:
        whole = whole.clone()
    return whole.view(torch.int32)


def pad(tensor: Tensor, *shape: int) -> Tensor:
    """Return a tensor with zeros after its end, in a larger shape."""
    if tensor.shape == shape:
        return tensor
    larger = tensor.new_zeros(shape)
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger
