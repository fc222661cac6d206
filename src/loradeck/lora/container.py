"""Where a bank keeps its adapters: as a child module of the model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from loradeck.lora.adapter import Adapter


class AdapterContainer(nn.Module):
    """The adapters by name. They move with the model and are among its parameters, but not in its state_dict."""

    def __init__(self, moved: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
        """`moved(fn)` is called after the tensors were moved or cast by fn(tensor)."""
        super().__init__()
        self._names: dict[str, Adapter] = {}
        self._moved = moved

    def names(self) -> list[str]:
        """Return all names, in the order of addition."""
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str) -> Adapter | None:
        """Return the adapter of this name, or None."""
        return self._names.get(name)

    def put(self, name: str, adapter: Adapter) -> None:
        """Add an adapter."""
        self.add_module(_child(name), adapter)
        self._names[name] = adapter

    def remove(self, name: str) -> None:
        """Remove an adapter."""
        delattr(self, _child(name))
        del self._names[name]

    def rename(self, old: str, new: str) -> None:
        """Rename an adapter; its position stays."""
        adapter = self._names[old]
        delattr(self, _child(old))
        self.add_module(_child(new), adapter)
        self._names = {new if name == old else name: each for name, each in self._names.items()}

    def clear(self) -> None:
        """Remove all adapters."""
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
    """Return the module that adapters can be a child of: the model, or inside a list of modules, which calls or counts
    its children, the first module that is not a list."""
    while isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict) and (first := next(model.children(), None)):
        model = first
    return model


def _child(name: str) -> str:
    """Return the child module's name: nn.Module reserves the dot, and a name like `train` would hide a method."""
    return "@" + name.replace("%", "%25").replace(".", "%2E")
