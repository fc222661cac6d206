"""Where a bank keeps its adapters, and the working sets made of them. Knows names and identities; knows no layers."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from torch import Tensor, nn

from loradeck.lora.adapter import Adapter
from loradeck.lora.routing import Route, WorkingSet, mix_of

KEPT_SETS = 2  # the stacks of a working set cost about its adapters' bytes once more, in float32


class AdapterContainer(nn.Module):
    """The adapters as a child of the model: they move with it and are among its parameters, not in its state_dict."""

    def __init__(self, moved: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
        """`moved` is called after the tensors were moved or cast, with what moves or casts a tensor."""
        super().__init__()
        self._names: dict[str, Adapter] = {}
        self._moved = moved

    def names(self) -> list[str]:
        """Return all names, in the order they came."""
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str) -> Adapter | None:
        """Return the adapter of this name, None if there is none."""
        return self._names.get(name)

    def put(self, name: str, adapter: Adapter) -> None:
        """Take an adapter in."""
        self.add_module(_child(name), adapter)
        self._names[name] = adapter

    def remove(self, name: str) -> None:
        """Let an adapter go."""
        delattr(self, _child(name))
        del self._names[name]

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name, in its old place."""
        adapter = self._names[old]
        delattr(self, _child(old))
        self.add_module(_child(new), adapter)
        self._names = {new if name == old else name: own for name, own in self._names.items()}

    def clear(self) -> None:
        """Let all go."""
        for name in self.names():
            self.remove(name)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdapterContainer":
        super()._apply(fn, recurse)
        self._moved(fn)
        return self

    # pyrefly: ignore [bad-override]  (a narrower result than torch's overloads)
    def state_dict(self, *_: Any, destination: dict[str, Any] | None = None, **__: Any) -> dict[str, Any]:
        """Return nothing: a model's state_dict stays the base's own."""
        return {} if destination is None else destination


def host(model: nn.Module) -> nn.Module:
    """Return the module that adapters can be a child of: the model, or in a list of modules, which calls or counts
    its children, the first that is no list."""
    while isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict) and (first := next(model.children(), None)):
        model = first
    return model


def _child(name: str) -> str:
    """Return the name of a child module: nn.Module reserves the dot, and a name like `train` would hide a method."""
    return "@" + name.replace("%", "%25").replace(".", "%2E")


class WorkingSets:
    """The working sets in use lately."""

    def __init__(self) -> None:
        self._known: list[WorkingSet] = []  # the last used one last
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["WorkingSets"], tuple[()]]:
        """A copy begins empty: its adapters are other objects."""
        return WorkingSets, ()

    def route(
        self,
        bank: object,
        entries: Sequence[tuple[tuple[Adapter, float], ...]],
        lengths: tuple[int, ...],
        *,
        packed: bool,
    ) -> Route:
        """Return a route of these entries, over a working set with their adapters and perhaps a few others."""
        members = tuple(dict.fromkeys(adapter for entry in entries for adapter, _ in entry))
        with self._lock:  # until the route is made: a set that has one is not changed
            working_set = self._set(members) if members else None
            index = {adapter: i for i, adapter in enumerate(working_set.members)} if working_set else {}
            mixed = tuple(tuple((index[adapter], weight) for adapter, weight in entry) for entry in entries)
            return Route(bank, working_set, mix_of(mixed, lengths), packed)

    def _set(self, members: tuple[Adapter, ...]) -> WorkingSet:
        """Return a set that is there, or that no route uses and that becomes the one that is needed, or a new one."""
        wanted = frozenset(members)
        self._known = [own for own in self._known if own.fresh]
        found = next((own for own in reversed(self._known) if own.holds(wanted)), None)
        if found is None:
            before = self._similar(wanted)
            found = WorkingSet(members) if before is None else before.evolved(members)
            self._known = [own for own in self._known if own is not before][1 - KEPT_SETS :]
        else:
            self._known.remove(found)
        self._known.append(found)
        return found

    def _similar(self, wanted: frozenset[Adapter]) -> WorkingSet | None:
        """Return the set that is most easily turned into one of these adapters, None where a new one is as easy."""
        idle = [own for own in self._known if not len(own.routes)]
        best = max(idle, key=lambda own: len(wanted.intersection(own.members)), default=None)
        if best is not None and (len(self._known) >= KEPT_SETS or not wanted.isdisjoint(best.members)):
            return best
        return None

    def forget(self, adapter: Adapter) -> None:
        """Take an adapter out of every set; routes that are there keep theirs until they end."""
        with self._lock:
            self._known = [
                own.without(adapter) if adapter in own.members else own
                for own in self._known
                if adapter not in own.members or (own.fresh and len(own.members) > 1 and not len(own.routes))
            ]

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._known.clear()
