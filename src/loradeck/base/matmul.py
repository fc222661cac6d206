"""Products with frozen weights, float32 within where half precision is only emulated. Knows tensors; knows no layers.

On a CPU without arithmetic for bfloat16 or float16 torch's products in them take several times as long as float32's. So
a block of weights at a time is made float32 there: the values stay, no copy is kept, and sums are more exact.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.dtypes import computes_in

FEW = 4  # rows up to which a weight is read once in half precision sooner than made float32
BLOCK = 1 << 20  # weights made plain at a time: they fit the cache, and the head's never exist all at once


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X Wᵀ + bias: x (…, in), weight (out, in), bias (out,) -> (…, out) in x's dtype."""
    items = x.reshape(-1, x.shape[-1])
    if len(items) <= FEW or not _widened(x, weight) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    y = items.new_empty(len(items), len(weight))
    items = items.float()
    for rows in blocks(weight):
        y[:, rows] = F.linear(items, weight[rows].float(), None if bias is None else bias[rows].float())
    return y.view(*x.shape[:-1], len(weight))


def back(grad: Tensor, weight: Tensor) -> Tensor:
    """G W, the gradient of `linear`'s x: grad (…, out), weight (out, in) -> (…, in) in grad's dtype."""
    weight = weight.to(grad.dtype)
    if not _widened(grad, weight):
        return grad @ weight
    items = grad.reshape(-1, grad.shape[-1])
    dx = torch.zeros(len(items), weight.shape[1])
    for rows in blocks(weight):
        dx.addmm_(items[:, rows].float(), weight[rows].float())
    return dx.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])


def blocks(weight: Tensor) -> Iterator[slice]:
    """Cut a weight (out, in) into slices of outputs, of BLOCK weights or less where a single output has no more."""
    step = max(1, BLOCK // weight.shape[1])
    return (slice(at, at + step) for at in range(0, len(weight), step))


def _widened(x: Tensor, weight: Tensor) -> bool:
    return x.is_cpu and x.dtype == weight.dtype and not computes_in(x.dtype, x.device)
