"""Which operands each run of rows goes through, at which weight. Knows numbers; knows no names and no layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from loradeck.ops.dropout import dropped

KEPT = 8  # plans of one mix, for working sets that lie otherwise

Entry = tuple[tuple[int, float], ...]  # (operand, weight) pairs; empty for the base
Slot = tuple[int, int]  # where an operand lies in stacks: (ranks, number)
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Group:
    """The runs that share one entry: where they lie, in units of one run length."""

    entry: Entry
    spans: tuple[tuple[int, int], ...]  # [start, end) of each run, ascending

    def rows(self, unit: int, device: torch.device) -> Tensor | slice:
        """Return where they lie among items of which `unit` make one run length; as a slice where they are one run."""
        if len(self.spans) == 1:
            return slice(self.spans[0][0] * unit, self.spans[0][1] * unit)
        return torch.cat([torch.arange(start * unit, stop * unit, device=device) for start, stop in self.spans])


def take(items: Tensor, rows: Tensor | slice) -> Tensor:
    """Return these rows; a view of a slice."""
    return items[rows] if isinstance(rows, slice) else items.index_select(0, rows)


def add(
    items: Tensor, rows: Tensor | slice, left: Tensor, right: Tensor, *, factor: float = 1.0, keep: Tensor | None = None
) -> None:
    """items[rows] += factor · left right, but for what `keep` drops; in place."""
    if isinstance(rows, slice) and keep is None and items.dtype == left.dtype == right.dtype:
        items[rows].addmm_(left, right, alpha=factor)
    elif isinstance(rows, slice):
        items[rows].add_(dropped(left @ right, keep), alpha=factor)
    else:
        items.index_add_(0, rows, dropped(left @ right, keep).to(items.dtype), alpha=factor)


@dataclass(frozen=True, slots=True)
class Mix:
    """A batch as consecutive runs. `lengths` counts rows (1 each), or tokens of a packed row."""

    entries: tuple[Entry, ...]
    lengths: tuple[int, ...]
    groups: tuple[Group, ...] = field(init=False)
    total: int = field(init=False)
    plans: dict[object, Any] = field(init=False, default_factory=dict, compare=False)
    """How it is computed, for the operands that it met lately: the steps of a decode are alike."""
    last: tuple[Any, ...] | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        ends = list(accumulate(self.lengths))
        spans: dict[Entry, list[tuple[int, int]]] = {}
        for entry, end, length in zip(self.entries, ends, self.lengths, strict=True):
            own = spans.setdefault(entry, [])
            if own and own[-1][1] == end - length:
                own[-1] = (own[-1][0], end)  # neighbours become one run
            else:
                own.append((end - length, end))
        object.__setattr__(self, "groups", tuple(Group(entry, tuple(own)) for entry, own in spans.items()))
        object.__setattr__(self, "total", ends[-1] if ends else 0)

    def kept(
        self,
        make: Callable[["Mix", Sequence[Slot], int, torch.device], Made],
        slots: Sequence[Slot],
        unit: int,
        device: torch.device,
    ) -> Made:
        """Return make(mix, slots, unit, device), made once: `slots` the operands', `unit` the items of a run length."""
        last = self.last
        if last and last[0] is slots and last[1:4] == (make, unit, device):
            return cast("Made", last[4])  # the layers of a step ask for the same, and a key of many slots hashes slowly
        key = (make, tuple(slots), unit, device)
        known = self.plans.get(key)
        if known is None:
            while len(self.plans) >= KEPT:
                self.plans.pop(next(iter(self.plans)), None)
            known = self.plans[key] = make(self, slots, unit, device)
        object.__setattr__(self, "last", (slots, make, unit, device, known))
        return cast("Made", known)
