"""The product of rows with one matrix in blocks, for models that are computed module by module."""

import ctypes

import torch
from torch import Tensor

from loradeck.native.blocks import FORMATS, OUTPUTS, pad
from loradeck.native.library import CMatrix, CProduct, library, options_for
from loradeck.native.quantised import Quantised


def product(x: Tensor, weight: Tensor | Quantised, outputs: int, bias: Tensor | None, *, halves: bool) -> Tensor:
    """X Wᵀ + bias: x (…, I) in a floating-point dtype, bias (O,) -> (…, O).

    The weight (O, I) is quantised, or in blocks (O / 16, I / 32, 512).

    Raises:
        OSError: the code cannot be compiled.
        MemoryError: there is not enough for these rows.
    """
    items = x.reshape(-1, x.shape[-1]).contiguous()
    y = items.new_empty(len(items), outputs)
    if isinstance(weight, Quantised):
        matrix = CMatrix.from_buffer_copy(weight.matrix)
    else:
        matrix = CMatrix(weight.data_ptr(), weight.shape[0], weight.shape[1], FORMATS[weight.dtype], None)
    if bias is not None:
        bias = pad(bias.detach().float(), matrix.tiles * OUTPUTS)
        matrix.bias = bias.data_ptr()
    c = CProduct(matrix, items.data_ptr(), y.data_ptr(), len(items), items.shape[1], outputs, FORMATS[items.dtype])
    if len(items) and library(options_for(halves=halves)).loradeck_product(ctypes.byref(c), torch.get_num_threads()):
        raise MemoryError("out of memory in a product; send fewer rows at once")
    return y.view(*x.shape[:-1], outputs)
