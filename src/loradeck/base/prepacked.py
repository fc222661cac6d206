"""Linear layers whose weight is packed once in oneDNN's layout (torch's private mkldnn ops).

nn.Linear packs its weight anew at every call. The packed weight is the only copy: `dense` returns the plain one, bit
for bit, and the layer's state_dict and a move to another dtype or device use that.
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loradeck.base.frozen import LayoutLinear
from loradeck.base.self_check import Product, why_not_usable

MIN_WEIGHTS = 256 * 256  # smaller layers stay plain: at 64 x 64 a packed product takes 23 µs, a plain one 7
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # share of the largest output: sums in another order


class PackedWeight(nn.Parameter):
    """A weight in oneDNN's layout (torch._mkldnn). It is immutable, so copies of a model share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        return self

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        return _pack_weight, (self.to_dense(),)


class PackedLinear(LayoutLinear):
    """An nn.Linear with a packed weight, or with a plain one that has replaced it (a merge does that)."""

    def dense(self) -> Tensor:
        return self.weight.to_dense() if self.weight.is_mkldnn else self.weight

    def product(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not weight.is_mkldnn or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.dense(), self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, self.bias, "none", [], "")

    def lay_out(self) -> None:
        pack(self)


def pack(linear: nn.Linear) -> None:
    """Pack a linear layer's weight in place if that makes it faster; otherwise leave the layer as it is."""
    weight = linear.weight
    fits = weight.device.type == "cpu" and weight.numel() >= MIN_WEIGHTS and weight.dtype in TOLERANCE
    if fits and why_not_packed(weight.dtype) is None:
        linear.__class__ = PackedLinear
        linear.weight = _pack_weight(weight.detach())


@cache
def why_not_packed(dtype: torch.dtype) -> str | None:
    """Return why weights of this dtype are not packed on this machine, or None if they are. Checked once a process."""
    return why_not_usable(_products, dtype, TOLERANCE[dtype])


def _pack_weight(weight: Tensor) -> PackedWeight:
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous()), requires_grad=False)


def _products(weight: Tensor) -> tuple[Product, Product]:
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.__class__ = PackedLinear
    layer.weight = _pack_weight(weight)
    if not torch.equal(layer.weight.to_dense(), weight):
        raise ValueError("unpacking a packed weight changes it")
    return layer.forward, partial(F.linear, weight=weight)
