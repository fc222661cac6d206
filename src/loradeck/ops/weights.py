"""The low-rank weights of a layer: one adapter's pair, and what a layer holds for a working set."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from loradeck.dtypes import computes_in
from loradeck.ops.dropout import Dropout
from loradeck.ops.layer_kinds import LayerKind
from loradeck.ops.segments import Segments

FEW_ROWS = 32
# The dtypes that kernels read by address, as numbers in the address table; the CPU's reads the first two.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf; one pass, a tenth of the time of torch.isfinite(tensor).all()."""
    low, high = torch.aminmax(tensor.detach())  # both carry a NaN through
    return math.isfinite(low) and math.isfinite(high)


def compute_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Return the dtype in which a layer with input x and output y computes its update in torch.

    That is the layer's own. On a CPU it is float32 where half precision is only emulated, and for few rows, whose
    products take longer to start in half precision than to compute; float32 is then faster and no less exact.
    """
    dtype = x.dtype if x.is_floating_point() else y.dtype
    half = dtype == torch.bfloat16 or dtype == torch.float16
    if not half or x.device.type != "cpu" or (computes_in(dtype, x.device) and x.numel() > FEW_ROWS * x.shape[-1]):
        return dtype
    return torch.float32


def in_range(factor: float, dtype: torch.dtype) -> float:
    """Return a factor for tensors of a dtype, infinite where it overflows; torch would raise."""
    limit = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    return factor if abs(factor) <= limit else math.copysign(math.inf, factor)


def dtype_code(dtype: torch.dtype, device: torch.device) -> int | None:
    """Return the number of a dtype that the device's kernel reads by address, None if it reads no such weights."""
    return None if dtype == torch.float16 and device.type == "cpu" else DTYPE_CODES.get(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """One adapter's A and B at one layer, in the shapes of the layer's kind."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: Dropout | None = None
    path: str = ""
    """The layer's, so that its dropout masks differ from other layers'."""
    _casts: dict[torch.dtype, tuple[int, "LoraWeights"]] = field(default_factory=dict, init=False, repr=False)

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def version(self) -> int | None:
        """A number that changes when a tensor is written to (torch's version counters); None while one trains.

        torch's fused optimizers, and writes to `.data`, leave the counters as they are.
        """
        if self.a.requires_grad or self.b.requires_grad:
            return None
        return self.a._version + self.b._version

    def to(self, dtype: torch.dtype) -> "LoraWeights":
        """Return the weights in a dtype. The copy is kept until they are written to; under autograd the cast is part
        of the graph."""
        if self.a.dtype == self.b.dtype == dtype:
            return self
        version = self.version
        if version is None and torch.is_grad_enabled():
            return replace(self, a=self.a.to(dtype), b=self.b.to(dtype))
        cast = self._casts.get(dtype)
        if cast is not None and cast[0] == version:
            return cast[1]
        with torch.inference_mode(False), torch.no_grad():
            weights = replace(self, a=self.a.to(dtype), b=self.b.to(dtype))
        if version is not None:
            self._casts[dtype] = version, weights
        return weights

    def addressable(self) -> "LoraWeights":
        """Return the weights as kernels can read them by address: contiguous, of one dtype that they know."""
        code = dtype_code(self.a.dtype, self.a.device)
        weights = self if code is not None and self.a.dtype == self.b.dtype else self.to(torch.float32)
        if weights.a.is_contiguous() and weights.b.is_contiguous():
            return weights
        return replace(weights, a=weights.a.contiguous(), b=weights.b.contiguous())

    def address(self) -> list[int]:
        """Return the row of an address table for addressable weights."""
        return [self.a.data_ptr(), self.b.data_ptr(), self.r, DTYPE_CODES[self.a.dtype]]


@dataclass(frozen=True, slots=True, eq=False)
class Addresses:
    """Where a layer's adapters keep their weights, for kernels that read them there.

    M adapters of the working set.
    """

    table: Tensor
    """(M, 4) int64: the addresses of A and B, r, the dtype's code; r = 0 if the adapter leaves the layer alone."""
    scaling: Tensor
    """(M,) float32."""
    rank: int
    """The largest r of the layer, of all adapters."""
    movable: frozenset[int] = frozenset()
    """Adapters to look up at each call: their memory may be exchanged, or must be cast first."""
    memory: object = None
    """What keeps the addresses valid."""

    @classmethod
    def of(cls, adapters: Sequence[LoraWeights | None]) -> "Addresses":
        """Return the addresses of weights that are views, which keep their memory; the others are movable."""
        table, scaling = [[0] * 4 for _ in adapters], [0.0] * len(adapters)
        movable = set()
        for i, weights in enumerate(adapters):
            if weights is None:
                continue
            fixed = weights.a._base is not None and weights.b._base is not None
            if fixed and weights.addressable() is weights:
                table[i], scaling[i] = weights.address(), weights.scaling
            else:
                movable.add(i)
        device = next((weights.a.device for weights in adapters if weights), torch.device("cpu"))
        rank = max((weights.r for weights in adapters if weights), default=0)
        return cls(
            torch.tensor(table, dtype=torch.int64, device=device).view(-1, 4),
            torch.tensor(scaling, dtype=torch.float32, device=device),
            rank,
            frozenset(movable),
            [weights for weights in adapters if weights],
        )


class LayerAdapters:
    """What one layer holds for a working set: the weights of each adapter, None where one leaves the layer alone."""

    def __init__(
        self,
        kind: LayerKind,
        weights: Sequence[LoraWeights | None],
        find_addresses: Callable[[], Addresses] | None = None,
    ) -> None:
        """`weights` may be a lazy sequence; `find_addresses` spares looking at each of them."""
        self.kind, self.weights = kind, weights
        self._find_addresses = find_addresses or (lambda: Addresses.of(weights))

    @cached_property
    def _addresses(self) -> Addresses:
        return self._find_addresses()

    @property
    def rank(self) -> int:
        """The largest rank of the adapters at this layer."""
        return self._addresses.rank

    def addresses(self, segments: Segments) -> tuple[Tensor, Tensor, object]:
        """Return the address table (M, 4) int64 and the scaling (M,) float32 for the adapters of these segments.

        The third result keeps the addresses valid: hold it until the kernel is done.
        """
        fixed = self._addresses
        movable = fixed.movable.intersection(segments.adapters) if fixed.movable else ()
        current = {i: weights.addressable() for i in movable if (weights := self.weights[i])}
        if not current:
            return fixed.table, fixed.scaling, fixed
        table, scaling = fixed.table.clone(), fixed.scaling.clone()  # other threads may look up the same adapters
        index = torch.tensor([*current], device=table.device)
        table[index] = torch.tensor([weights.address() for weights in current.values()], device=table.device)
        scaling[index] = torch.tensor([weights.scaling for weights in current.values()], device=table.device)
        return table, scaling, current

    def drops(self) -> bool:
        """Whether an adapter has dropout."""
        return any(weights is not None and weights.dropout is not None for weights in self.weights)

    def repeats(self, adapters: Sequence[int]) -> bool:
        """Whether these adapters drop the same inputs when the layer is computed again: their seeds are set."""
        dropouts = [weights.dropout for i in adapters if (weights := self.weights[i])]
        return all(dropout is None or dropout.seed is not None for dropout in dropouts)
