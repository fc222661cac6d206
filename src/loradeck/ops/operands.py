"""The low-rank pairs that meet at one layer. Knows tensors; knows no names and no routes."""

from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from loradeck.ops.dropout import Dropout
from loradeck.ops.forms import Form
from loradeck.ops.mix import Mix


def finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds no NaN and no Inf; one pass, a tenth of the time of torch.isfinite(tensor).all()."""
    low, high = torch.aminmax(tensor.detach())  # both carry a NaN through
    return bool(torch.isfinite(low) & torch.isfinite(high))


@cache
def _native(dtype: torch.dtype) -> bool:
    """Say whether the CPU has arithmetic for a half-precision dtype; an older torch does not tell."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    names = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(able.get(name) for name in names)


def compute_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Return the dtype in which a layer of input x and output y computes its update.

    That is the layer's own; on a CPU that only emulates it, float32, which is then faster and no less exact.
    """
    dtype = x.dtype if x.is_floating_point() else y.dtype
    half = dtype == torch.bfloat16 or dtype == torch.float16
    return torch.float32 if half and x.device.type == "cpu" and not _native(dtype) else dtype


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Pack:
    """Several pairs as one: A along the rank (R, …) and B (out, R).

    Matrices lie in memory with the rank last for A and first for B, as the products read them: a quarter to a half
    faster at 16 rows than the other way round.
    """

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
    _packs: dict[torch.dtype, tuple[int | None, Pack]] = field(default_factory=dict)
    _casts: dict[tuple[int, torch.dtype], tuple[int | None, Pair]] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        return tuple(pair.r if pair else 0 for pair in self.pairs)

    @cached_property
    def scalings(self) -> tuple[float, ...]:
        return tuple(pair.scaling if pair else 0.0 for pair in self.pairs)

    @cached_property
    def _leaves(self) -> tuple[Tensor, ...]:
        """Return the tensors that can ask for gradients; a frozen adapter's, as views, cannot."""
        tensors = [t for pair in self.pairs if pair for t in (pair.a, pair.b)]
        return tuple(t for t in tensors if t._base is None or t.requires_grad)

    @cached_property
    def _watched(self) -> tuple[Tensor, ...]:
        """Return one tensor for each version counter: views of one storage share theirs."""
        views = [t for pair in self.pairs if pair for t in (pair.a, pair.b) if t._base is not None]
        return *self._leaves, *{view.untyped_storage().data_ptr(): view for view in views}.values()

    @property
    def trains(self) -> bool:
        """Whether a pair asks for gradients; asked at each call, because tensors can be thawed."""
        return any(leaf.requires_grad for leaf in self._leaves)

    @property
    def version(self) -> int | None:
        """A number that changes when a tensor is written to (torch's version counters); None while one trains.

        torch's fused optimizers, and writes to `.data`, leave the counters as they are.
        """
        return None if self.trains else sum([tensor._version for tensor in self._watched])

    @cached_property
    def total_rank(self) -> int:
        return sum(self.ranks)

    @cached_property
    def drops(self) -> bool:
        return any(pair is not None and pair.dropout is not None for pair in self.pairs)

    def repeats(self, mix: Mix) -> bool:
        """Say whether a batch drops the same when it is computed again; asked at each call, because seeds are set."""
        used = [self.pairs[operand] for group in mix.groups for operand, _ in group.entry]
        return all(pair is None or pair.dropout is None or pair.dropout.seed is not None for pair in used)

    def pair(self, operand: int, dtype: torch.dtype) -> Pair | None:
        """Return a pair in the dtype its layer computes in; under autograd the cast is part of the graph."""
        pair = self.pairs[operand]
        if pair is None or pair.a.dtype == dtype:
            return pair
        if torch.is_grad_enabled() and (pair.a.requires_grad or pair.b.requires_grad):
            return replace(pair, a=pair.a.to(dtype), b=pair.b.to(dtype))
        current = self.version
        version, cast = self._casts.get((operand, dtype), (None, pair))
        if version is None or version != current:
            with torch.inference_mode(False), torch.no_grad():
                cast = replace(pair, a=pair.a.to(dtype), b=pair.b.to(dtype))
            self._casts[operand, dtype] = current, cast
        return cast

    def pack(self, dtype: torch.dtype) -> Pack:
        """Return all pairs as one, in `dtype`, outside autograd."""
        current = self.version
        version, pack = self._packs.get(dtype, (None, None))
        if pack is None or version is None or version != current:
            pairs = [pair for pair in self.pairs if pair is not None]
            with torch.inference_mode(False), torch.no_grad():
                # Transposed twice: the same matrix, in the other order in memory.
                a = torch.cat([pair.a.to(dtype).movedim(0, -1) for pair in pairs], dim=-1).movedim(-1, 0)
                b = torch.cat([self.form.dense_b(pair.b).to(dtype).T for pair in pairs]).T
                pack = Pack(a, b, finite(a) and finite(b))
            self._packs[dtype] = current, pack
        return pack
