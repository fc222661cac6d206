"""Linear layers and embeddings whose weights are quantised, as the compiled step reads them.

The quantised weight is the only copy, and copies of a model share it. A layer computes with its values in the dtype of
the model; what is decoded for a product is freed after it. A merge, or a load of plain weights, replaces it by a plain
one, and the module's state_dict has plain ones.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loradeck.base.frozen import FrozenLinear, Layout
from loradeck.base.matmul import BLOCK, linear
from loradeck.base.pauses import pause
from loradeck.dtypes import computes_in
from loradeck.native.blocks import FORMATS, OUTPUTS
from loradeck.native.library import any_library, multiplies_halves
from loradeck.native.library import int8_pays as int8_pays
from loradeck.native.product import product
from loradeck.native.quantised import Quantised

FEW = 64  # rows up to which the step's product is faster than decoding first


class _Room(threading.local):
    """Each thread's memory for decoded weights: to get it anew would take as long as to decode them."""

    memory = torch.empty(0)

    def of(self, numbers: int) -> Tensor:
        if len(self.memory) < numbers:
            self.memory = torch.empty(numbers)
        return self.memory


_room = _Room()


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
        weight = self.get_parameter("weight")
        return weight.quantised.dense(dtype=self.dtype) if isinstance(weight, QuantisedWeight) else weight

    def plain(self) -> dict[str, Tensor]:
        return {"weight": self.dense().contiguous()}

    def lay_out(self) -> None:
        """Leave a plain weight as it is: to quantise it again would change it."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Layout:
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
        if x.dtype != self.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.dense(), self.bias)
        items = x.reshape(-1, self.in_features)
        if len(items) <= FEW and x.dtype in FORMATS:
            halves = multiplies_halves(x.dtype)
            return product(x, weight.quantised, self.out_features, self.bias, halves=halves)
        items = items.to(_product_dtype(x))
        y = items.new_empty(len(items), self.out_features)
        for rows, part in _parts(weight.quantised, items.dtype):
            torch.mm(items, part.T, out=y[:, rows])
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def input_grad(self, grad: Tensor) -> Tensor:
        weight = self.weight
        if not isinstance(weight, QuantisedWeight):
            return super().input_grad(grad)
        items = grad.reshape(-1, self.out_features).to(_product_dtype(grad))
        if self.out_features <= _step(weight.quantised):
            ((_, whole),) = _parts(weight.quantised, items.dtype)
            return (items @ whole).to(grad.dtype).view(*grad.shape[:-1], self.in_features)
        wide = torch.promote_types(items.dtype, torch.float32)  # the sum over the parts is rounded once
        dx = items.new_zeros(len(items), self.in_features, dtype=wide)
        for rows, part in _parts(weight.quantised, items.dtype):
            if items.dtype == wide:
                dx.addmm_(items[:, rows], part)
            else:
                dx += items[:, rows] @ part
        return dx.to(grad.dtype).view(*grad.shape[:-1], self.in_features)


class QuantisedEmbedding(_QuantisedLayout, nn.Embedding):
    """An nn.Embedding with a quantised weight; a scaled one (Gemma) stays scaled."""

    def forward(self, input: Tensor) -> Tensor:
        """Token ids (…) -> (…, dim)."""
        weight = self.weight
        quantised = isinstance(weight, QuantisedWeight)
        y = weight.quantised.rows(input, self.dtype) if quantised else F.embedding(input, weight)
        scale = getattr(self, "embed_scale", None)
        return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)


def _parts(weight: Quantised, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the outputs with their plain weights (out', in), which hold until the next are taken.

    There is a pause after each.
    """
    step = _step(weight)
    room = _room.of(step * weight.inputs)
    for at in range(0, weight.outputs, step):
        rows = slice(at, min(at + step, weight.outputs))
        yield rows, weight.dense(rows, dtype, room)
        pause()


def _step(weight: Quantised) -> int:
    """Return the number of outputs in a part."""
    return max(1, BLOCK // weight.inputs // OUTPUTS) * OUTPUTS


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to multiply in: float32 where the CPU only emulates that of x."""
    return x.dtype if computes_in(x.dtype, x.device) else torch.float32


def set_weight(module: nn.Linear | nn.Embedding, weight: QuantisedWeight, dtype: torch.dtype) -> None:
    """Give a frozen layer a quantised weight, in place; it computes in a dtype."""
    layer: Any = module
    layer.__class__ = QuantisedLinear if isinstance(module, nn.Linear) else QuantisedEmbedding
    layer.weight, layer.dtype = weight, dtype


def quantisation(model: nn.Module) -> str | None:
    """Return how a model's weights are quantised, as in "Q4_K, Q6_K", that of most weights first; None if none is."""
    sizes: Counter[str] = Counter()
    for each in model.parameters():
        if isinstance(each, QuantisedWeight):
            sizes[each.quantised.kind.name] += each.quantised.shape.numel()
    return ", ".join(name for name, _ in sizes.most_common()) or None


@cache
def why_not_quantised() -> str | None:
    """Return why this machine computes nothing with quantised weights, or None if it does. Checked once a process."""
    try:
        any_library()
    except OSError as error:
        return f"the compiled step is unavailable ({str(error).partition(chr(10))[0][:100]})"
    return None
