"""Linear layers whose weight is laid out once as oneDNN's kernels read it. Knows torch's private ops for that.

nn.Linear lays its weight out anew at every call. The packed weight is the only copy: `dense` gives the plain one back,
bit for bit, and so do the layer's state_dict and a move to another dtype or device.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loradeck.base.frozen import FrozenLinear
from loradeck.base.self_check import Product, self_check

SMALLEST = 256 * 256  # weights below it are left alone: at 64 x 64 a packed product takes 23 µs, a plain one 7
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # of the largest output: the order of summation


class PackedWeight(nn.Parameter):
    """A weight in oneDNN's own layout (torch._mkldnn). Nothing can write into it, so copies of a model share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        return self

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        return _packed, (self.to_dense(),)


class PackedLinear(FrozenLinear):
    """An nn.Linear with a packed weight, or with a plain one where something has put that in its place (a merge)."""

    def dense(self) -> Tensor:
        return self.weight.to_dense() if self.weight.is_mkldnn else self.weight

    def product(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not weight.is_mkldnn or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.dense(), self.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, self.bias, "none", [], "")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "PackedLinear":
        unpack(self)
        super()._apply(fn, recurse)
        pack(self)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        unpack(self)
        super()._load_from_state_dict(*args, **kwargs)
        pack(self)


def pack(linear: nn.Linear) -> None:
    """Give a linear layer a packed weight in place of its own, where that pays; else leave it as it is."""
    weight = linear.weight
    pays = weight.device.type == "cpu" and weight.numel() >= SMALLEST and weight.dtype in TOLERANCE
    if pays and not packing(weight.dtype):
        linear.__class__ = PackedLinear
        linear.weight = _packed(weight.detach())


def unpack(linear: PackedLinear) -> None:
    """Give the layer its plain weight back."""
    linear.weight = nn.Parameter(linear.dense().detach(), requires_grad=False)


@cache
def packing(dtype: torch.dtype) -> str:
    """Return why weights of a dtype are not packed on this machine; "" where they are. Tried once per process."""
    return self_check(_pair, dtype, TOLERANCE[dtype])


def _packed(weight: Tensor) -> PackedWeight:
    return PackedWeight(torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous()), requires_grad=False)


def _pair(weight: Tensor) -> tuple[Product, Product]:
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.__class__ = PackedLinear
    layer.weight = _packed(weight)
    if not torch.equal(layer.weight.to_dense(), weight):
        raise ValueError("a packed weight does not come back as it was")
    return layer.forward, partial(F.linear, weight=weight)
