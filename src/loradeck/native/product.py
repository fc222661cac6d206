"""The product of rows with one matrix in blocks, for models that are computed module by module."""

import ctypes

import torch
from torch import Tensor

from loradeck.native.blocks import FORMATS, OUTPUTS, pad
from loradeck.native.library import HALVES, CMatrix, CProduct, library


def product(x: Tensor, blocks: Tensor, outputs: int, bias: Tensor | None, *, halves: bool) -> Tensor:
    """X Wᵀ + bias: x (…, I) in a floating-point dtype, blocks (O / 16, I / 32, 512), bias (O,) -> (…, O).

    Raises:
        OSError: the code cannot be compiled.
        MemoryError: there is not enough for these rows.
    """
    items = x.reshape(-1, x.shape[-1]).contiguous()
    y = items.new_empty(len(items), outputs)
    if bias is not None:
        bias = pad(bias.detach().float(), blocks.shape[0] * OUTPUTS)
    matrix = CMatrix(
        blocks.data_ptr(), blocks.shape[0], blocks.shape[1], FORMATS[blocks.dtype], None,
        None if bias is None else bias.data_ptr(),
    )  # fmt: skip
    c = CProduct(matrix, items.data_ptr(), y.data_ptr(), len(items), items.shape[1], outputs, FORMATS[items.dtype])
    if len(items) and library(HALVES if halves else "").loradeck_product(ctypes.byref(c), torch.get_num_threads()):
        raise MemoryError("out of memory in a product; send fewer rows at once")
    return y.view(*x.shape[:-1], outputs)
