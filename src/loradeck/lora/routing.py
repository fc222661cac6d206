"""Which adapters, at which weight, each row goes through. Knows no layer's arithmetic and no files."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from operator import index
from sys import float_info
from typing import TYPE_CHECKING
from weakref import WeakSet

from loradeck.errors import RouteError
from loradeck.lora.adapter import Adapter
from loradeck.ops.mapping import Entry, Mix, Slot
from loradeck.ops.operands import Operands, slots_of
from loradeck.ops.stack import width_of
from loradeck.ops.weights import Pair

if TYPE_CHECKING:
    from loradeck.lora.layer import LoraLayer

Blend = Mapping[str, float]
RouteEntry = str | None | Blend

# Each thread and each asyncio task has its own route, and a thread begun inside a route begins without one.
_route: ContextVar["Route | None"] = ContextVar("loradeck_route", default=None)


@dataclass(eq=False)
class WorkingSet:
    """The adapters of a route, and what each layer holds of them. Kept while routes ask for the same adapters."""

    members: tuple[Adapter, ...]
    slots: tuple[Slot, ...] = ()
    """Where each member lies in stacks, the same at every layer; one after the other by default."""
    layers: dict["LoraLayer", Operands | None] = field(default_factory=dict)
    routes: "WeakSet[Route]" = field(default_factory=WeakSet)
    """Those that use it; without any, its stacks may be taken over by another."""
    _before: dict["LoraLayer", tuple[tuple[Adapter, ...], Operands]] = field(default_factory=dict)
    moves: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.moves = [adapter.moves for adapter in self.members]
        if not self.slots:
            self.slots = slots_of([*map(rank, self.members)])

    @property
    def fresh(self) -> bool:
        """Whether the members' tensors are still where they were: moving or casting an adapter makes new ones."""
        return self.moves == [adapter.moves for adapter in self.members]

    def holds(self, wanted: Collection[Adapter]) -> bool:
        """Say whether it holds these adapters, and so close together that few other slots are computed along."""
        own = dict(zip(self.members, self.slots, strict=True))
        return all(adapter in own for adapter in wanted) and _are_close([own[adapter] for adapter in wanted])

    def evolved(self, wanted: Sequence[Adapter]) -> "WorkingSet":
        """Return a set that holds these adapters, and takes over this one's stacks: only newcomers are copied.

        Members that are not wanted stay while nobody needs their place. This set is not to be used any more.
        """
        return self._after(placed(wanted, dict(zip(self.members, self.slots, strict=True))))

    def without(self, adapter: Adapter) -> "WorkingSet":
        """Return a set of the other members that takes over this one's stacks, and keeps nothing of the adapter."""
        slots = dict(zip(self.members, self.slots, strict=True))
        del slots[adapter]
        others = self._after(slots)
        for layer in [*others._before]:
            others.operands(layer)
        return others

    def _after(self, slots: Mapping[Adapter, Slot]) -> "WorkingSet":
        before = self._before | {
            layer: (self.members, operands) for layer, operands in self.layers.items() if operands is not None
        }
        return WorkingSet((*slots,), (*slots.values(),), _before=before)

    def operands(self, layer: "LoraLayer") -> Operands | None:
        """Return the members' pairs at a layer, None where no member adapts it."""
        try:
            return self.layers[layer]
        except KeyError:
            members, before = self._before.pop(layer, ((), None))
            pairs = dict(zip(members, before.pairs, strict=True)) if before else {}
            own = tuple(pairs[adapter] if adapter in pairs else _pair(adapter, layer.path) for adapter in self.members)
            known = None
            if any(own):
                known = before.evolved(own, self.slots) if before else Operands(layer.form, own, self.slots)
            self.layers[layer] = known
            return known


def rank(adapter: Adapter) -> int:
    """Return the most ranks that an adapter has at any layer."""
    return max((site.r for site in adapter.sites.values()), default=0)


KEPT_SLOTS = 16  # of a width, for adapters that are not wanted now: they cost memory, but no time


def placed(wanted: Sequence[Adapter], before: Mapping[Adapter, Slot]) -> dict[Adapter, Slot]:
    """Return slots for adapters: where they lay before, newcomers in the first that is free, and close together.

    Others that lay there stay after them, for they may be asked for again.
    """
    slots = {own: before[own] for own in wanted if own in before}
    for own in wanted:
        if own not in slots:
            slots[own] = _free([*slots.values()], width_of(rank(own)))
    for own in sorted(slots, key=slots.__getitem__, reverse=True):
        if _are_close([*slots.values()]):
            break
        slots[own] = min(slots[own], _free([*slots.values()], slots[own][0]))
    counts = Counter(width for width, _ in slots.values())
    for own, (width, number) in before.items():
        if own not in slots and number < max(KEPT_SLOTS, 2 * counts[width]) and (width, number) not in slots.values():
            slots[own] = (width, number)
    return slots


def _free(taken: Collection[Slot], width: int) -> Slot:
    return next((width, number) for number in count() if (width, number) not in taken)


def _are_close(slots: Sequence[Slot]) -> bool:
    """Say whether the slots of each width are at least half of all up to the last of them."""
    counts = Counter(width for width, _ in slots)
    return all(number < 2 * counts[width] for width, number in slots)


def _pair(adapter: Adapter, path: str) -> Pair | None:
    site = adapter.sites.get(path)
    if site is None:
        return None
    a, b = adapter.pair(path)
    return Pair(a, b, site.scaling, adapter.dropout if adapter.trainable else None, path)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Route:
    """One opened route: a batch's mix over a working set."""

    bank: object
    working_set: WorkingSet | None  # None: the base alone
    mix: Mix
    packed: bool  # entries are segments of tokens, not rows
    outer: "Route | None" = None

    def __post_init__(self) -> None:
        if self.working_set is not None:
            self.working_set.routes.add(self)

    @property
    def members(self) -> tuple[Adapter, ...]:
        """The adapters that it may use."""
        return self.working_set.members if self.working_set else ()

    def operands(self, layer: "LoraLayer") -> Operands | None:
        """Return what the layer must add, None for nothing."""
        return None if self.working_set is None else self.working_set.operands(layer)


def current(bank: object) -> Route | None:
    """Return the innermost open route of a bank in this thread."""
    route = _route.get()
    while route is not None and route.bank is not bank:
        route = route.outer
    return route


@contextmanager
def opened(route: Route, enter: Callable[[Route], None], leave: Callable[[Route], None]) -> Iterator[None]:
    """Make a route the current one of its bank in this thread until the block ends, however it ends.

    Its bank is told by `enter`, which may refuse, and by `leave`.
    """
    enter(route)
    route.outer = _route.get()
    token = _route.set(route)
    try:
        yield
    finally:
        _route.reset(token)
        leave(route)


def weights_of(entry: RouteEntry) -> tuple[tuple[str, float], ...]:
    """Return an entry as (name, weight) pairs; the base is ().

    Raises:
        RouteError: no name, None or {name: weight}.
    """
    if entry is None:
        return ()
    if isinstance(entry, str):
        return ((entry, 1.0),)
    if not isinstance(entry, Mapping) or not all(isinstance(name, str) for name in entry):
        raise RouteError(
            f"{entry!r} is no entry of a route", hint="An entry is an adapter's name, None, or {name: weight}."
        )
    for name, weight in entry.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= float_info.max:
            raise RouteError(f"the weight of {name!r} is {repr(weight)[:40]}", hint="A weight is a finite number.")
    return tuple((name, float(weight)) for name, weight in entry.items() if weight != 0)


def entries_of(
    rows: RouteEntry | Sequence[RouteEntry], lengths: Sequence[int] | None
) -> tuple[list[RouteEntry], tuple[int, ...]]:
    """Return a route's entries and the length of each, in rows or in tokens.

    Raises:
        RouteError: an empty list, or lengths that do not go with the entries.
    """
    many = isinstance(rows, Sequence) and not isinstance(rows, str)
    entries: list[RouteEntry] = [*rows] if many else [rows]  # type: ignore[list-item, misc]
    if not entries:
        raise RouteError("this route has no entry", hint="Give one entry per row, or one for the whole batch.")
    if lengths is None:
        return entries, (1,) * len(entries)
    try:
        sizes = tuple(index(length) for length in lengths)  # whole numbers of any library
    except TypeError:
        sizes = ()
    if len(sizes) != len(entries) or min(sizes) < 1:
        raise RouteError(
            f"lengths {repr(lengths)[:60]} do not go with {len(entries)} entries",
            hint="Give each packed segment's number of tokens, one per entry.",
        )
    return entries, sizes


@lru_cache(maxsize=256)
def mix_of(entries: tuple[Entry, ...], lengths: tuple[int, ...]) -> Mix:
    """Return the mix of these entries; kept, because its masks are the same at every step of a decode."""
    return Mix(entries, lengths)
