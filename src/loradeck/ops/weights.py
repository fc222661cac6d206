"""One adapter's low-rank tensors at a layer. Knows tensors; knows no batch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loradeck.ops.dropout import Dropout


def finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds no NaN and no Inf; one pass, a tenth of the time of torch.isfinite(tensor).all()."""
    low, high = torch.aminmax(tensor.detach())  # both carry a NaN through
    return math.isfinite(low) and math.isfinite(high)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One adapter's low-rank tensors at one layer, in the shapes of its form."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: Dropout | None = None
    place: str = ""  # what tells this layer's masks from the other layers'

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def version(self) -> int | None:
        """A number that changes when a tensor is written to; None while one trains."""
        if self.a.requires_grad or self.b.requires_grad:
            return None
        return self.a._version + self.b._version
