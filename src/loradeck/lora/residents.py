"""Where a bank keeps its adapters, and the working sets made of them. Knows names and identities; knows no layers."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Any

from torch import Tensor, nn

from loradeck.lora.adapter import Adapter
from loradeck.lora.routing import WorkingSet

KEPT_SETS = 2  # the packed tensors of a working set cost about its adapters' bytes once more


class Residents(nn.Module):
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

    def _apply(self, fn: Any, recurse: bool = True) -> "Residents":
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
        self._known: OrderedDict[frozenset[Adapter], WorkingSet] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["WorkingSets"], tuple[()]]:
        """A copy begins empty: its adapters are other objects."""
        return WorkingSets, ()

    def of(self, members: tuple[Adapter, ...]) -> WorkingSet:
        """Return a working set that holds these adapters and at most as many others."""
        wanted = frozenset(members)
        with self._lock:
            key = wanted if wanted in self._known else None
            if key is None:
                key = next((own for own in self._known if wanted < own and len(own) <= 2 * len(wanted)), None)
            if key is None or not self._known[key].fresh:
                key = wanted
                self._known[key] = WorkingSet(members)
                if len(self._known) > KEPT_SETS:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key]

    def forget(self, adapter: Adapter) -> None:
        """Drop every set that holds this adapter."""
        with self._lock:
            for key in [own for own in self._known if adapter in own]:
                del self._known[key]

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._known.clear()
