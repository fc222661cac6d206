"""Linear layers and embeddings whose weights are quantised, as the compiled step reads them.

The quantised weight is the only copy, and copies of a model share it. A layer computes with its values in the dtype of
the model; what is decoded for a product is freed after it. A merge, or a load of plain weights, replaces it by a plain
one, and the module's state_dict has plain ones.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loradeck.base.frozen import FrozenLinear, Layout
from loradeck.base.matmul import BLOCK, input_grad, linear
from loradeck.native.blocks import OUTPUTS
from loradeck.native.library import any_library, multiplies_halves
from loradeck.native.product import product
from loradeck.native.quantised import Quantised

FEW = 64  # rows up to which the step's product is faster than decoding first


class QuantisedWeight(nn.Parameter):
    """A quantised weight as a module's parameter. It is immutable: models share it.

    Attributes:
        sample: values of the plain weight that it was made from, as the fingerprint reads them, if there was one.
    """

    quantised: Quantised
    sample: Tensor | None

    def __new__(cls, quantised: Quantised, sample: Tensor | None = None) -> "QuantisedWeight":
        weight = nn.Parameter.__new__(cls, quantised.tiles, requires_grad=False)
        weight.quantised, weight.sample = quantised, sample
        return weight

    def __init__(self, quantised: Quantised, sample: Tensor | None = None) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantisedWeight":
        return self

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        return QuantisedWeight, (self.quantised, self.sample)


class _QuantisedLayout(Layout):
    """A layer with a quantised weight, or with a plain one that has replaced it.

    Attributes:
        dtype: what it computes in.
    """

    dtype: torch.dtype

    def dense(self) -> Tensor:
        """Return the weight (out, in) in the dtype that the layer computes in."""
        weight = self.weight
        return weight.quantised.dense(dtype=self.dtype) if isinstance(weight, QuantisedWeight) else weight

    def plain(self) -> dict[str, Tensor]:
        return {"weight": self.dense().contiguous()}

    def lay_out(self) -> None:
        """Leave a plain weight as it is: to quantise it again would change it."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "_QuantisedLayout":
        weight = self._parameters["weight"]
        like = fn(torch.empty(0, dtype=self.dtype))
        if not isinstance(weight, QuantisedWeight) or like.device != weight.device:
            return super()._apply(fn, recurse)
        del self._parameters["weight"]  # only the dtype that it is decoded to changes
        nn.Module._apply(self, fn, recurse)
        self._parameters["weight"], self.dtype = weight, like.dtype
        return self


class QuantisedLinear(_QuantisedLayout, FrozenLinear):
    """An nn.Linear with a quantised weight."""

    def product(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not isinstance(weight, QuantisedWeight):
            return linear(x, weight, self.bias)
        items = x.reshape(-1, self.in_features)
        if len(items) <= FEW and x.dtype == self.dtype and not torch.is_autocast_enabled(x.device.type):
            halves = multiplies_halves(x.dtype)
            return product(x, weight.quantised, self.out_features, self.bias, halves=halves)
        y = items.new_empty(len(items), self.out_features)
        for rows in self._parts():
            y[:, rows] = linear(items, weight.quantised.dense(rows, x.dtype), None)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def input_grad(self, grad: Tensor) -> Tensor:
        weight = self.weight
        if not isinstance(weight, QuantisedWeight):
            return super().input_grad(grad)
        parts = [input_grad(grad[..., rows], weight.quantised.dense(rows, grad.dtype)) for rows in self._parts()]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _parts(self) -> Iterator[slice]:
        """Yield slices of the outputs, so many that their plain weights fit the cache."""
        step = max(1, BLOCK // self.in_features // OUTPUTS) * OUTPUTS
        return (slice(at, min(at + step, self.out_features)) for at in range(0, self.out_features, step))


class QuantisedEmbedding(_QuantisedLayout, nn.Embedding):
    """An nn.Embedding with a quantised weight; a scaled one (Gemma) stays scaled."""

    def forward(self, input: Tensor) -> Tensor:
        """Token ids (…) -> (…, dim)."""
        weight = self.weight
        quantised = isinstance(weight, QuantisedWeight)
        y = weight.quantised.rows(input, self.dtype) if quantised else F.embedding(input, weight)
        scale = getattr(self, "embed_scale", None)
        return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)


def set_weight(module: nn.Linear | nn.Embedding, weight: QuantisedWeight, dtype: torch.dtype) -> None:
    """Give a frozen layer a quantised weight, in place; it computes in a dtype."""
    module.__class__ = QuantisedLinear if isinstance(module, nn.Linear) else QuantisedEmbedding
    module.weight, module.dtype = weight, dtype


@cache
def why_not_quantised() -> str | None:
    """Return why this machine computes nothing with quantised weights, or None if it does. Checked once a process."""
    try:
        any_library()
    except OSError as error:
        return f"the compiled step is unavailable ({str(error).partition(chr(10))[0][:100]})"
    return None
