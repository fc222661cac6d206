"""Working sets: the adapters of a route, and what each layer holds for them."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain
from threading import Lock
from typing import NamedTuple, overload

import torch
from torch import Tensor

from loradeck.lora.adapter import Adapter
from loradeck.lora.added_rows import Part
from loradeck.ops.layer_kinds import LayerKind
from loradeck.ops.weights import Addresses, LayerAdapters, LoraWeights

KEPT_SETS = 4

Views = dict[str, LoraWeights | None]  # by module path, as far as a layer has needed tensors


class AddressTables(NamedTuple):
    """Where the members' weights lie at every layer: L layers, M members."""

    layers: dict[str, int]
    """Module path -> its index in L."""
    table: Tensor
    """(L, M, 4) int64: see Addresses."""
    scaling: Tensor
    """(L, M) float32."""
    ranks: list[int]
    """The largest rank at each layer."""
    movable: frozenset[int]
    """Members that are looked up at each call."""
    memory: list[Tensor]
    """What the addresses point into."""


class WorkingSet:
    """The adapters of a route. Kept while routes ask for some of them."""

    def __init__(self, views: dict[Adapter, Views]) -> None:
        """Make a set of these adapters; the views of adapters in an older set can be shared with it."""
        self.views = views
        self.members = tuple(views)
        self.index = {adapter: i for i, adapter in enumerate(self.members)}
        self._layers: dict[str, LayerAdapters | None] = {}
        self._moves = [adapter.moves for adapter in self.members]

    def __reduce__(self) -> tuple[type["WorkingSet"], tuple[dict[Adapter, Views]]]:
        """A copy has no addresses: its adapters are copies too."""
        return WorkingSet, ({adapter: {} for adapter in self.members},)

    @property
    def current(self) -> bool:
        """Whether the members' tensors are where they were: moving or casting an adapter creates new ones."""
        return self._moves == [adapter.moves for adapter in self.members]

    def without(self, adapter: Adapter) -> "WorkingSet":
        """Return a set of the other members."""
        return WorkingSet({member: views for member, views in self.views.items() if member is not adapter})

    def layer(self, path: str, kind: LayerKind) -> LayerAdapters | None:
        """Return what the layer at a path holds for the members, None if no member adapts it."""
        try:
            return self._layers[path]
        except KeyError:
            adapters = None
            if any(path in adapter.sites for adapter in self.members):
                adapters = LayerAdapters(kind, LayerWeights(self, path), partial(self._addresses, path))
            self._layers[path] = adapters
            return adapters

    def replacements(self, path: str) -> tuple[Part, ...] | None:
        """Return what the members have in place of the module at a path, None if none of them replaces it."""
        modules = tuple(adapter.replacements.get(path) for adapter in self.members)
        return modules if any(module is not None for module in modules) else None

    def _addresses(self, path: str) -> Addresses:
        tables = self._tables
        sites = [site for i in tables.movable if (site := self.members[i].sites.get(path))]
        i = tables.layers[path]
        rank = max([tables.ranks[i], *(site.r for site in sites)])
        return Addresses(tables.table[i], tables.scaling[i], rank, tables.movable, tables)

    @cached_property
    def _tables(self) -> AddressTables:
        """The addresses for all layers at once: by layer and adapter, a new set would cost more than its first step."""
        shapes = {id(adapter.sites): adapter.sites for adapter in self.members}  # few, and shared
        layers = {path: i for i, path in enumerate(dict.fromkeys(chain.from_iterable(shapes.values())))}
        table = torch.zeros(len(layers), len(self.members), 4, dtype=torch.int64)
        scaling = torch.zeros(len(layers), len(self.members))
        memory: list[Tensor] = []
        indices: dict[int, Tensor] = {}  # by layout
        movable: set[int] = set()
        for i, adapter in enumerate(self.members):
            layout, addresses = adapter.layout, adapter.addresses()
            if layout is None or addresses is None:
                movable.add(i)
                continue
            if id(layout) not in indices:
                indices[id(layout)] = torch.tensor([layers[path] for path in layout.paths])
            table[indices[id(layout)], i] = addresses
            scaling[indices[id(layout)], i] = layout.scaling
            memory += [parameter.detach() for parameter in adapter.parameters()]
        device = next((parameter.device for parameter in self.members[0].parameters()), torch.device("cpu"))
        ranks = table[:, :, 2].amax(1).tolist()
        return AddressTables(layers, table.to(device), scaling.to(device), ranks, frozenset(movable), memory)


class LayerWeights(Sequence[LoraWeights | None]):
    """The members' weights at one layer, looked up when a kernel needs their tensors."""

    def __init__(self, working_set: WorkingSet, path: str) -> None:
        self._set, self._path = working_set, path

    def __len__(self) -> int:
        return len(self._set.members)

    @overload
    def __getitem__(self, index: int) -> LoraWeights | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[LoraWeights | None]: ...
    def __getitem__(self, index: int | slice) -> LoraWeights | list[LoraWeights | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        adapter = self._set.members[index]
        views = self._set.views[adapter]
        if self._path not in views:
            views[self._path] = adapter.weights(self._path)
        return views[self._path]

    def __iter__(self) -> Iterator[LoraWeights | None]:
        return (self[i] for i in range(len(self)))


class WorkingSets:
    """The sets that routes asked for last."""

    def __init__(self) -> None:
        self._recent: list[WorkingSet] = []  # the last used one first
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["WorkingSets"], tuple[()]]:
        """A copy is empty: its adapters are other objects."""
        return WorkingSets, ()

    def get(self, adapters: Iterable[Adapter]) -> WorkingSet:
        """Return a set with these adapters, and perhaps others: a recent one, else a new one."""
        needed = dict.fromkeys(adapters)
        with self._lock:
            recent = [each for each in self._recent if each.current]
            working_set = next((each for each in recent if needed.keys() <= each.index.keys()), None)
            if working_set is None:
                views: dict[Adapter, Views] = {}
                for each in reversed(recent):
                    views |= each.views
                working_set = WorkingSet({adapter: views.get(adapter, {}) for adapter in needed})
            self._recent = [working_set, *(each for each in recent if each is not working_set)][:KEPT_SETS]
            return working_set

    def forget(self, adapter: Adapter) -> None:
        """Take an adapter out of every set; routes that exist keep theirs."""
        with self._lock:
            sets = [each.without(adapter) if adapter in each.index else each for each in self._recent]
            self._recent = [each for each in sets if each.members]

    def clear(self) -> None:
        """Drop all sets."""
        with self._lock:
            self._recent.clear()
