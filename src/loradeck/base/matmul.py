"""Matrix products with frozen weights, computed in float32 on a CPU that only emulates half precision.

On such a CPU torch's bfloat16 and float16 products take several times as long as float32's. So the weight is converted
to float32 a block at a time: its values stay the same, no copy is kept, and sums are more exact.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.base.pauses import pause
from loradeck.dtypes import computes_in

FEW = 4  # rows up to which reading the weight in half precision is faster than converting it
BLOCK = 1 << 20  # weights converted at a time: they fit the cache, and the head is never converted as a whole


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X Wᵀ + bias: x (…, in), weight (out, in), bias (out,) -> (…, out) in x's dtype."""
    items = x.reshape(-1, x.shape[-1])
    if len(items) <= FEW or not _is_emulated(x, weight) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    y = items.new_empty(len(items), len(weight))
    items = items.float()
    for rows in blocks(weight):
        y[:, rows] = F.linear(items, weight[rows].float(), None if bias is None else bias[rows].float())
    return y.view(*x.shape[:-1], len(weight))


def input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """G W, the gradient of `linear` with respect to x: grad (…, out), weight (out, in) -> (…, in) in grad's dtype."""
    weight = weight.to(grad.dtype)
    if not _is_emulated(grad, weight):
        return grad @ weight
    items = grad.reshape(-1, grad.shape[-1])
    dx = torch.zeros(len(items), weight.shape[1])
    for rows in blocks(weight):
        dx.addmm_(items[:, rows].float(), weight[rows].float())
    return dx.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1])


def blocks(weight: Tensor, size: int = BLOCK) -> Iterator[slice]:
    """Yield slices of the outputs of a weight (out, in), each with at most `size` weights, or a single output.

    There is a pause after each.
    """
    step = max(1, size // weight.shape[1])
    for at in range(0, len(weight), step):
        yield slice(at, at + step)
        pause()


def _is_emulated(x: Tensor, weight: Tensor) -> bool:
    """Whether the product would be computed on a CPU, in a dtype it only emulates."""
    return x.is_cpu and x.dtype == weight.dtype and not computes_in(x.dtype, x.device)
