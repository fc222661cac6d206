"""The low-rank pairs that meet at one layer. Knows tensors; knows no names and no routes."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from loradeck.ops.forms import Form


def finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds no NaN and no Inf; one pass, a tenth of the time of torch.isfinite(tensor).all()."""
    low, high = torch.aminmax(tensor.detach())  # both carry a NaN through
    return bool(torch.isfinite(low) & torch.isfinite(high))


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapter's low-rank tensors at one layer, in the shapes of its form."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0
    generator: torch.Generator | None = None  # of the adapter's own dropout masks

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def version(self) -> int | None:
        """A number that changes when the tensors are written to (torch's version counters); None while they train.

        torch's fused optimizers, and writes to `.data`, leave the counters as they are.
        """
        return None if self.a.requires_grad or self.b.requires_grad else self.a._version + self.b._version

    @property
    def trains(self) -> bool:
        return self.a.requires_grad or self.b.requires_grad


@dataclass(frozen=True, slots=True)
class Pack:
    """Several pairs as one: A along the rank (R, …) and B (out, R)."""

    a: Tensor
    b: Tensor
    finite: bool


@dataclass(eq=False)
class Operands:
    """The pairs of a working set at one layer; an adapter that leaves the layer alone has None.

    The packed form is made once per dtype and again when a pair is written to; at each call while one trains.
    """

    form: Form
    pairs: tuple[Pair | None, ...]
    _packs: dict[torch.dtype, tuple[list[int | None], Pack]] = field(default_factory=dict)
    _casts: dict[tuple[int, torch.dtype], tuple[int | None, Pair]] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(pair.r if pair else 0 for pair in self.pairs)

    @cached_property
    def scalings(self) -> tuple[float, ...]:
        return tuple(pair.scaling if pair else 0.0 for pair in self.pairs)

    @property
    def trains(self) -> bool:  # asked at each call: tensors can be thawed
        return any(pair is not None and pair.trains for pair in self.pairs)

    @cached_property
    def drops(self) -> bool:
        return any(pair is not None and pair.dropout > 0 for pair in self.pairs)

    def pair(self, operand: int, dtype: torch.dtype) -> Pair | None:
        """Return a pair in the dtype its layer computes in; under autograd the cast is part of the graph."""
        pair = self.pairs[operand]
        if pair is None or pair.a.dtype == dtype:
            return pair
        if pair.trains and torch.is_grad_enabled():
            return Pair(pair.a.to(dtype), pair.b.to(dtype), pair.scaling, pair.dropout, pair.generator)
        version, cast = self._casts.get((operand, dtype), (None, pair))
        if version is None or version != pair.version:
            with torch.inference_mode(False), torch.no_grad():
                cast = Pair(pair.a.to(dtype), pair.b.to(dtype), pair.scaling, pair.dropout, pair.generator)
            self._casts[operand, dtype] = pair.version, cast
        return cast

    def pack(self, dtype: torch.dtype) -> Pack:
        """Return all pairs as one, in `dtype`, outside autograd."""
        pairs = [pair for pair in self.pairs if pair is not None]
        versions = [pair.version for pair in pairs]
        known, pack = self._packs.get(dtype, (versions, None))
        if pack is None or known != versions or None in versions:
            with torch.inference_mode(False), torch.no_grad():
                a = torch.cat([pair.a.to(dtype) for pair in pairs])
                b = torch.cat([self.form.dense_b(pair.b).to(dtype) for pair in pairs], dim=1)
                pack = Pack(a, b, finite(a) and finite(b))
            self._packs[dtype] = versions, pack
        return pack
