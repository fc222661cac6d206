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
    pairs = weight.reshape(outputs // OUTPUTS, OUTPUTS, inputs // INPUTS, INPUTS // 2, 2)
    order = (0, 2, 3, 4, 1) if weight.dtype == torch.float32 else (0, 2, 3, 1, 4)
    return pairs.permute(order).reshape(outputs // OUTPUTS, inputs // INPUTS, OUTPUTS * INPUTS)


def unpack(blocks: Tensor) -> Tensor:
    """Return the weight (O, I) of `pack`."""
    tiles, groups, _ = blocks.shape
    if blocks.dtype == torch.float32:
        pairs = blocks.view(tiles, groups, INPUTS // 2, 2, OUTPUTS).permute(0, 4, 1, 2, 3)
    else:
        pairs = blocks.view(tiles, groups, INPUTS // 2, OUTPUTS, 2).permute(0, 3, 1, 2, 4)
    return pairs.reshape(tiles * OUTPUTS, groups * INPUTS)


def pad(tensor: Tensor, *shape: int) -> Tensor:
    """Return a tensor with zeros after its end, in a larger shape."""
    if tensor.shape == shape:
        return tensor
    larger = tensor.new_zeros(shape)
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger
