"""The low-rank pairs that meet at one layer. Knows tensors; knows no names and no routes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from loradeck.dtypes import computes_in
from loradeck.ops.layer_kinds import Form
from loradeck.ops.mapping import Mix, Slot
from loradeck.ops.stack import Stack, width_of
from loradeck.ops.weights import Pair, finite

FEW_ROWS = 32


def compute_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Return the dtype in which a layer of input x and output y computes its update.

    That is the layer's own. On a CPU it is float32 where half precision is only emulated, and for few rows, whose
    products take longer to begin in half precision than to compute; float32 is then faster and no less exact.
    """
    dtype = x.dtype if x.is_floating_point() else y.dtype
    half = dtype == torch.bfloat16 or dtype == torch.float16
    if not half or x.device.type != "cpu" or (computes_in(dtype, x.device) and x.numel() > FEW_ROWS * x.shape[-1]):
        return dtype
    return torch.float32


def slots_of(ranks: Sequence[int]) -> tuple[Slot, ...]:
    """Return slots for pairs of these ranks, one after the other within a width."""
    seen: Counter[int] = Counter()
    found = []
    for width in map(width_of, ranks):
        found.append((width, seen[width]))
        seen[width] += 1
    return tuple(found)


@dataclass(eq=False)
class Operands:
    """The pairs of a working set at one layer; an adapter that leaves the layer alone has None.

    Stacks and casts are made once and again when a pair is written to; at each call while one trains.
    """

    form: Form
    pairs: tuple[Pair | None, ...]
    slots: tuple[Slot, ...] = ()
    """Where each pair lies in stacks; one after the other by default."""
    _casts: dict[tuple[Pair, torch.dtype], tuple[int | None, Pair]] = field(default_factory=dict)
    _sound: dict[Pair, tuple[int | None, bool]] = field(default_factory=dict)
    _stacks: dict[tuple[int, torch.dtype, torch.device], Stack] = field(default_factory=dict)
    _shown: dict[tuple[int, torch.dtype, torch.device, int, int], tuple[int | None, Tensor, Tensor]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        if not self.slots:
            self.slots = slots_of([pair.r if pair else 1 for pair in self.pairs])

    def evolved(self, pairs: tuple[Pair | None, ...], slots: tuple[Slot, ...]) -> "Operands":
        """Return operands that take over the stacks of these, with what still lies at its place there.

        These are not to be used any more.
        """
        casts = {key: cast for key, cast in self._casts.items() if key[0] in pairs}
        own = {*pairs, *(cast for _, cast in casts.values())}
        sound = {pair: known for pair, known in self._sound.items() if pair in own}
        made = Operands(self.form, pairs, slots, casts, sound, self._stacks)
        for (width, _, _), stack in self._stacks.items():
            made._fill(width, stack)
        return made

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
        version = pair.version
        known = self._casts.get((pair, dtype))
        if known is None or version is None or known[0] != version:
            with torch.inference_mode(False), torch.no_grad():
                known = version, replace(pair, a=pair.a.to(dtype), b=pair.b.to(dtype))
            self._casts[pair, dtype] = known
        return known[1]

    def finite(self, operand: int, dtype: torch.dtype) -> bool:
        """Say whether a pair, in the dtype its layer computes in, holds no NaN and no Inf."""
        pair = self.pair(operand, dtype)
        if pair is None:
            return True
        version = pair.version
        known = self._sound.get(pair)
        if known is None or version is None or known[0] != version:
            known = self._sound[pair] = (version, finite(pair.a) and finite(pair.b))
        return known[1]

    def stack(self, width: int, x: Tensor, first: int, slots: int) -> tuple[Tensor, Tensor]:
        """Return slots of so many ranks from the `first` on, A (S, I, W) and B (S, W, O), for an input of the layer.

        On the CPU they are float32 at least: its batched products are slower in half precision, and less exact.
        """
        key = (width, x.dtype, x.device, first, slots)
        version = self.version
        known = self._shown.get(key)
        if known is None or known[0] is None or known[0] != version:
            stack = self._stack(width, x)
            self._fill(width, stack)
            chosen = slice(first, first + slots)
            known = self._shown[key] = (version, stack.a[chosen], stack.b[chosen])
        return known[1], known[2]

    def _stack(self, width: int, x: Tensor) -> Stack:
        dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        stack = self._stacks.get((width, dtype, x.device))
        if stack is None:
            (_, inside), (outside, _) = self.form.shapes(width)
            with torch.inference_mode(False):
                stack = self._stacks[width, dtype, x.device] = Stack(width, inside, outside, dtype, x.device)
        return stack

    def _fill(self, width: int, stack: Stack) -> None:
        own = [(slot, pair) for pair, (w, slot) in zip(self.pairs, self.slots, strict=True) if w == width]
        with torch.inference_mode(False), torch.no_grad():
            stack.fill({slot: pair for slot, pair in own if pair}, max((slot for slot, _ in own), default=-1) + 1)
