"""Which operands each run of rows goes through, at which weight. Knows numbers; knows no names and no layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loradeck.ops.dropout import dropped

if TYPE_CHECKING:
    from loradeck.ops.plan import Plan, Slot

Entry = tuple[tuple[int, float], ...]  # (operand, weight) pairs; empty for the base


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
    plans: "dict[object, Plan]" = field(init=False, default_factory=dict, compare=False)
    """How it is computed, for the operands that it met lately: the steps of a decode are alike."""
    last_plan: "tuple[Sequence[Slot], int, torch.device, Plan] | None" = field(init=False, default=None, compare=False)

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
