"""The low-rank pairs that meet at one layer. Knows tensors; knows no names and no routes."""

from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate

import torch
from torch import Tensor

from loradeck.ops.forms import Form
from loradeck.ops.mix import Mix
from loradeck.ops.pair import Pack, Pair, Room


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


@dataclass(eq=False)
class Operands:
    """The pairs of a working set at one layer; an adapter that leaves the layer alone has None.

    The packed form is made once per dtype and again when a pair is written to; at each call while one trains.
    """

    form: Form
    pairs: tuple[Pair | None, ...]
    starts: tuple[int, ...] = ()
    """Where each pair's ranks begin in a pack; one after the other by default."""
    _packs: dict[tuple[torch.dtype, bool], tuple[int | None, Pack]] = field(default_factory=dict)
    _casts: dict[tuple[int, torch.dtype], tuple[int | None, Pair]] = field(default_factory=dict)
    _rooms: dict[torch.dtype, Room] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.starts:
            ends = accumulate(pair.r if pair else 0 for pair in self.pairs)
            self.starts = (0, *ends)[: len(self.pairs)]

    def evolved(self, pairs: tuple[Pair | None, ...], starts: tuple[int, ...]) -> "Operands":
        """Return operands that take over the memory of these, and what still lies at its place there.

        These are not to be used any more.
        """
        for room in self._rooms.values():
            room.keep(pairs)
        return Operands(self.form, pairs, starts, _rooms=self._rooms)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Of each pair: where its ranks begin and end in a pack."""
        ranks = (pair.r if pair else 0 for pair in self.pairs)
        return tuple((start, start + r) for start, r in zip(self.starts, ranks, strict=True))

    @cached_property
    def width(self) -> int:
        """Ranks of a pack."""
        return max((stop for start, stop in self.spans if stop > start), default=0)

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
        graph = torch.is_grad_enabled()
        current = self.version
        version, pack = self._packs.get((dtype, graph), (None, None))
        if pack is None or version is None or version != current:
            # A graph may keep the pack for its backward pass, so that one is never written to again.
            room = Room() if graph else self._rooms.setdefault(dtype, Room())
            with torch.inference_mode(False), torch.no_grad():
                pack = room.pack(self.form, self.pairs, self.spans, self.width, dtype)
            self._packs[dtype, graph] = current, pack
        return pack
