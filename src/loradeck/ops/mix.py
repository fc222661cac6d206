"""Which operands each run of rows goes through, at which weight. Knows numbers; knows no names and no layers.

R total rank of the packed operands, T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

Entry = tuple[tuple[int, float], ...]  # (operand, weight) pairs; empty for the base


@dataclass(frozen=True, slots=True)
class Group:
    """The runs that share one entry: where they lie, in units of one run length."""

    entry: Entry
    spans: tuple[tuple[int, int], ...]  # [start, end) of each run, ascending


@dataclass(frozen=True, slots=True)
class Mix:
    """A batch as consecutive runs. `lengths` counts rows (1 each), or tokens of a packed row."""

    entries: tuple[Entry, ...]
    lengths: tuple[int, ...]
    groups: tuple[Group, ...] = field(init=False)
    total: int = field(init=False)
    _masks: dict[object, tuple[Tensor, float | None]] = field(init=False, default_factory=dict, compare=False)

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

    def mask(
        self, ranks: Sequence[int], scalings: Sequence[float], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, float | None]:
        """Say which packed ranks each run uses, and at which factor weight · scaling.

        Returns (unused (total, 1, R) bool, factor) where every use has one factor, else (factors (total, 1, R), None);
        an unused rank has the factor 0.
        """
        key = (tuple(ranks), tuple(scalings), dtype, device)
        known = self._masks.get(key)
        if known is None:
            known = self._masks[key] = self._build_mask(ranks, scalings, dtype, device)
        return known

    def _build_mask(
        self, ranks: Sequence[int], scalings: Sequence[float], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, float | None]:
        rows = []
        for entry in self.entries:
            row = [0.0] * len(ranks)
            for operand, weight in entry:
                row[operand] += weight * scalings[operand]
            rows.append(row)
        with torch.inference_mode(False):  # kept across calls, so it must be usable under autograd too
            factors = torch.tensor(rows, dtype=torch.float64).repeat_interleave(torch.tensor(ranks), dim=1)
            factors = factors.repeat_interleave(torch.tensor(self.lengths), dim=0).unsqueeze(1)
            used = factors[factors != 0]
            # A factor beyond the range would be Inf for every row, and Inf · 0 is NaN; in the mask it is its rows' own.
            largest = torch.finfo(torch.promote_types(dtype, torch.float32)).max
            if len(used) and bool((used == used[0]).all()) and abs(used[0]) <= largest:
                return (factors == 0).to(device), float(used[0])
            return factors.to(device=device, dtype=dtype), None
