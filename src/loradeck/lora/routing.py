"""Routes: which adapters, at which weights, each row of a batch goes through."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from sys import float_info

from loradeck.errors import RouteError
from loradeck.lora.adapter import Adapter
from loradeck.lora.added_rows import Part
from loradeck.lora.working_set import WorkingSet, WorkingSets
from loradeck.ops.layer_kinds import LayerKind
from loradeck.ops.mapping import AdapterWeights, LoraMapping
from loradeck.ops.weights import LayerAdapters

Blend = Mapping[str, float]
RouteEntry = str | None | Blend

# Each thread and each asyncio task has its own route; a thread started inside a route starts without one.
_route: ContextVar["Route | None"] = ContextVar("loradeck_route", default=None)


@dataclass(eq=False, slots=True)
class Route:
    """A batch's mapping to the adapters of a working set."""

    bank: object
    working_set: WorkingSet | None  # None: the base alone
    mapping: LoraMapping
    packed: bool  # entries are segments of tokens, not rows
    head_mapping: LoraMapping | None = None  # of the tokens that reach the output head, where these are not all
    outer: "Route | None" = None

    @classmethod
    def of(
        cls,
        bank: object,
        working_sets: WorkingSets,
        entries: Sequence[Sequence[tuple[Adapter, float]]],
        lengths: tuple[int, ...],
        *,
        packed: bool,
        logits_to_keep: tuple[int, ...] | None = None,
    ) -> "Route":
        """Return a route of these entries, with a working set of their adapters."""
        adapters = [adapter for entry in entries for adapter, _ in entry]
        working_set = working_sets.get(adapters) if adapters else None
        index = working_set.index if working_set else {}
        mapped = tuple(tuple((index[adapter], weight) for adapter, weight in entry) for entry in entries)
        head_mapping = None if logits_to_keep is None else mapping_of(mapped, logits_to_keep)
        return cls(bank, working_set, mapping_of(mapped, lengths), packed, head_mapping)

    @property
    def members(self) -> tuple[Adapter, ...]:
        """The adapters that it may use."""
        return self.working_set.members if self.working_set else ()

    def replacements(self, path: str) -> Sequence[Part] | None:
        """Return what these adapters have in place of the module at a path, None if none of them replaces it."""
        return None if self.working_set is None else self.working_set.replacements(path)

    def layer(self, path: str, kind: LayerKind) -> LayerAdapters | None:
        """Return what the layer at a path holds for these adapters, None if none of them adapts it."""
        return None if self.working_set is None else self.working_set.layer(path, kind)


def current(bank: object) -> Route | None:
    """Return the innermost open route of a bank in this thread."""
    route = _route.get()
    while route is not None and route.bank is not bank:
        route = route.outer
    return route


def is_open() -> bool:
    """Return whether this thread is inside a route, of any bank."""
    return _route.get() is not None


@contextmanager
def opened(route: Route, enter: Callable[[Route], None], leave: Callable[[Route], None]) -> Iterator[None]:
    """Make a route the current one of its bank in this thread until the block ends.

    `enter` and `leave` notify its bank; `enter` may raise.
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
    """Return an entry as (name, weight) pairs, () for the base.

    Raises:
        RouteError: the entry is not a name, None or {name: weight}.
    """
    if entry is None:
        return ()
    if isinstance(entry, str):
        return ((entry, 1.0),)
    if not isinstance(entry, Mapping) or not all(isinstance(name, str) for name in entry):
        raise RouteError(
            f"invalid entry of a route: {entry!r}",
            hint="An entry is an adapter's name, a blend, or nothing for the base.",
            python="As in 'poet', {'poet': 0.7, 'pirate': 0.3} and None.",
        )
    for name, weight in entry.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= float_info.max:
            raise RouteError(f"invalid weight for {name!r}: {repr(weight)[:40]}", hint="A weight is a finite number.")
    return tuple((name, float(weight)) for name, weight in entry.items() if weight != 0)


def entries_of(
    rows: RouteEntry | Sequence[RouteEntry], lengths: Sequence[int] | None
) -> tuple[list[RouteEntry], tuple[int, ...]]:
    """Return a route's entries and the length of each, in rows or in tokens.

    Raises:
        RouteError: there is no entry, or the lengths do not match the entries.
    """
    many = isinstance(rows, Sequence) and not isinstance(rows, str)
    entries: list[RouteEntry] = [*rows] if many else [rows]  # type: ignore[list-item, misc]
    if not entries:
        raise RouteError("a route needs at least one entry", hint="Give one entry per row, or one for the whole batch.")
    if lengths is None:
        return entries, (1,) * len(entries)
    try:
        sizes = tuple(index(length) for length in lengths)  # integers of any library
    except TypeError:
        sizes = ()
    if len(sizes) != len(entries) or min(sizes) < 1:
        raise RouteError(
            f"lengths {repr(lengths)[:60]} do not match {len(entries)} entries",
            hint="Give the number of tokens of each packed segment, one per entry.",
        )
    return entries, sizes


def kept_of(logits_to_keep: Sequence[int] | None, lengths: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return how many tokens of each segment reach the output head, None if all do.

    Raises:
        RouteError: a segment has fewer tokens, or the numbers do not match the segments.
    """
    if logits_to_keep is None:
        return None
    try:
        kept = tuple(index(count) for count in logits_to_keep)
    except TypeError:
        kept = ()
    if len(kept) != len(lengths) or not all(0 <= count <= length for count, length in zip(kept, lengths, strict=True)):
        raise RouteError(
            f"logits_to_keep {repr(logits_to_keep)[:60]} does not match {len(lengths)} segments",
            hint="Give the number of tokens of each segment that reach the output head, from none to all.",
        )
    return kept


@lru_cache(maxsize=256)
def mapping_of(entries: tuple[AdapterWeights, ...], lengths: tuple[int, ...]) -> LoraMapping:
    """Return the mapping of these entries; cached, with its segments, since the steps of a decode are alike."""
    return LoraMapping(entries, lengths)
