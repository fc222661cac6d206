"""Which rows of a batch meet which slots of stacks, as indices. Knows a mix and slots; knows no adapter's tensors.

T items of the layer's input   S slots   M rows of a slot at most
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loradeck.ops.mapping import Group, Mix, Slot

# Microseconds on two CPU cores, of layers with 576 and 1536 features: `python -m benchmarks.ops`, results/ops.json.
SEGMENT, SEGMENT_ROW = 20.0, 0.9  # one adapter on one group by itself, and each of its rows
STRIPE, STRIPE_ROW = 55.0, 1.2  # all slots of a width at once, and each row of a slot, whether there is one or not


@dataclass(frozen=True, slots=True, eq=False)
class Stripe:
    """The rows that meet the slots of one width."""

    width: int
    first: int
    slots: int
    """S of them, from the first on."""
    take: Tensor
    """(S · M) the item in each row of each slot; any, where there are fewer."""
    weight: Tensor | None
    """(S, M, 1), None where all are 1."""
    places: Tensor | None
    """(K) which of the S · M are rows; None for all."""
    put: Tensor
    """(K) the item of each of them."""
    back: Tensor | None
    """(T) where each item's row is, if every item is in one row."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a mix is computed: few rows of many adapters in stripes, the rest group by group."""

    stripes: tuple[Stripe, ...]
    groups: tuple[Group, ...]


def plan_of(mix: Mix, slots: Sequence[Slot], unit: int, device: torch.device) -> Plan:
    """Return the cheapest plan, kept with the mix. `slots` are the operands', `unit` the items of one run length."""
    return mix.kept(_cheapest, slots, unit, device)


def _cheapest(mix: Mix, slots: Sequence[Slot], unit: int, device: torch.device) -> Plan:
    sizes = {group: sum(stop - start for start, stop in group.spans) * unit for group in mix.groups if group.entry}
    if unit == 0:
        return Plan((), ())  # no rows at all
    ways = [_split(sizes, most) for most in (0, *sorted(set(sizes.values())))]
    short, long = min(ways, key=lambda way: _cost(*way, sizes, slots))
    stripes = tuple(_stripe(width, short, slots, unit, mix.total * unit, device) for width in _widths(short, slots))
    return Plan(stripes, tuple(long))


def _split(sizes: dict[Group, int], most: int) -> tuple[list[Group], list[Group]]:
    return [own for own, size in sizes.items() if size <= most], [own for own, size in sizes.items() if size > most]


def _cost(short: Sequence[Group], long: Sequence[Group], sizes: dict[Group, int], slots: Sequence[Slot]) -> float:
    cost = sum(len(group.entry) * (SEGMENT + SEGMENT_ROW * sizes[group]) for group in long)
    for width in _widths(short, slots):
        rows: Counter[int] = Counter()
        for group in short:
            for operand, _ in group.entry:
                if slots[operand][0] == width:
                    rows[slots[operand][1]] += sizes[group]
        cost += STRIPE + STRIPE_ROW * (max(rows) + 1 - min(rows)) * max(rows.values())
    return cost


def _widths(groups: Iterable[Group], slots: Sequence[Slot]) -> list[int]:
    return sorted({slots[operand][0] for group in groups for operand, _ in group.entry})


def _stripe(
    width: int, groups: Sequence[Group], slots: Sequence[Slot], unit: int, total: int, device: torch.device
) -> Stripe:
    rows: dict[int, list[tuple[int, float]]] = {}
    for group in groups:
        items = [item for start, stop in group.spans for item in range(start * unit, stop * unit)]
        for operand, weight in group.entry:
            if slots[operand][0] == width:
                rows.setdefault(slots[operand][1], []).extend((item, weight) for item in items)
    first, most = min(rows), max(map(len, rows.values()))
    count = max(rows) + 1 - first
    take, weights = [0] * (count * most), [0.0] * (count * most)
    places: list[int] = []
    put: list[int] = []
    for slot in sorted(rows):
        for place, (item, weight) in enumerate(rows[slot], start=(slot - first) * most):
            take[place], weights[place] = item, weight
            places.append(place)
            put.append(item)
    back: Tensor | None = None
    if sorted(put) == list(range(total)):
        at = dict(zip(put, places, strict=True))
        back = torch.tensor([at[item] for item in range(total)], device=device)
    own_weights = {weights[place] for place in places}
    with torch.inference_mode(False):
        return Stripe(
            width,
            first,
            count,
            torch.tensor(take, device=device),
            None if own_weights == {1.0} else torch.tensor(weights, device=device).view(count, most, 1),
            None if places == list(range(count * most)) else torch.tensor(places, device=device),
            torch.tensor(put, device=device),
            back,
        )
