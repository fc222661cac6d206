"""Which items of a batch meet which pairs, one after the other. Knows a mix and ranks; knows no adapter's tensors.

T items of the layer's input   K meetings of an item with a pair   S pairs that are met   U units
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loradeck.ops.mapping import Group, Mix, Slot

# Microseconds on two CPU cores, of a layer from 576 to 1536 features: `python -m benchmarks.ops`, results/ops.json;
# between those of float32 and of bfloat16.
MEETING = 0.037  # an item with one rank of a pair
ALONE, ALONE_ITEM, ALONE_RANK = 45.0, 0.2, 0.016  # two dense products for a group, each of its items, and its ranks


@dataclass(frozen=True, eq=False)
class Meetings:
    """The items that meet each pair, in the order of the pairs."""

    item: Tensor
    """(K), int64; so are all but the weights."""
    weight: Tensor
    """(K), float32."""
    operands: tuple[int, ...]
    """(S) those whose pairs are met."""
    first: Tensor
    """(S + 1) the meetings of the s-th are first[s] to first[s + 1] - 1."""
    unit_pair: Tensor
    """(U) which of the S; a unit is a few meetings of one pair, which are computed together."""
    unit: Tensor
    """(U + 1) its meetings, likewise."""
    groups: tuple[Group, ...]
    """Those that are cheaper by themselves: many items, many ranks."""


def meetings(mix: Mix, slots: Sequence[Slot], unit: int, most: int) -> Meetings:
    """Return the meetings of a mix; `unit` is the items of one run length, `most` the meetings of a unit."""
    own: dict[int, list[tuple[int, float]]] = {}
    left: list[Group] = []
    for group in mix.groups:
        items = [item for start, stop in group.spans for item in range(start * unit, stop * unit)]
        if _alone(len(items), [slots[operand][0] for operand, _ in group.entry]):
            left.append(group)
            continue
        for operand, factor in group.entry:
            own.setdefault(operand, []).extend((item, factor) for item in items)
    met = [(operand, items) for operand, items in sorted(own.items()) if items]
    item: list[int] = []
    weight: list[float] = []
    first, unit_pair, units = [0], list[int](), list[int]()
    for number, (_, items) in enumerate(met):
        item += [each for each, _ in items]
        weight += [each for _, each in items]
        first.append(len(item))
        starts = range(first[-2], first[-1], most)
        units += starts
        unit_pair += [number] * len(starts)
    with torch.inference_mode(False):
        return Meetings(
            torch.tensor(item, dtype=torch.int64),
            torch.tensor(weight, dtype=torch.float32),
            tuple(operand for operand, _ in met),
            torch.tensor(first),
            torch.tensor(unit_pair, dtype=torch.int64),
            torch.tensor([*units, len(item)]),
            tuple(left),
        )


def _alone(items: int, ranks: Sequence[int]) -> bool:
    """Say whether two dense products for each adapter of a group are cheaper than its meetings."""
    return sum(ALONE + items * (ALONE_ITEM + ALONE_RANK * r - MEETING * r) for r in ranks) < 0
