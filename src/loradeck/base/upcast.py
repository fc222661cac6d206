"""Linear layers whose half-precision weight is multiplied in float32. Knows a CPU that only emulates half precision."""

from typing import Any

from torch import Tensor, nn

from loradeck.base.frozen import FrozenLinear
from loradeck.base.matmul import linear
from loradeck.dtypes import computes_in


class UpcastLinear(FrozenLinear):
    """An nn.Linear with its weight as it was, that the products of `loradeck.base.matmul` compute."""

    def dense(self) -> Tensor:
        return self.weight

    def product(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def widen(layer: nn.Linear) -> None:
    """Let a frozen linear layer compute in float32 where its device only emulates its dtype; else leave it."""
    weight: Any = layer.weight
    if weight.is_cpu and not computes_in(weight.dtype, weight.device):
        layer.__class__ = UpcastLinear
