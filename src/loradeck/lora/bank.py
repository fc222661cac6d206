"""The adapters resident on one model, and every way to change them. Knows any nn.Module; knows no language model."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import RLock

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError, AdapterNameError, LoradeckError, RouteError, UnknownAdapterError
from loradeck.lora import compatibility, init, merge, targets
from loradeck.lora.adapter import Adapter
from loradeck.lora.combine import Combination, Method, combine
from loradeck.lora.config import LoraConfig
from loradeck.lora.container import AdapterContainer, WorkingSets, host
from loradeck.lora.layer import LoraLayer
from loradeck.lora.manifest import TargetModule, read_folder
from loradeck.lora.memo import Memo
from loradeck.lora.names import check_name
from loradeck.lora.routing import Blend, Route, RouteEntry, entries_of, opened, weights_of
from loradeck.ops.layer_kinds import Form

RESIDENTS = "loradeck"  # the name of the adapters' place in the model


class Bank:
    """Many adapters on one frozen model; each row of a batch goes through its own, by `route`.

    Outside a route, and for rows routed to None, the model is exactly the base.
    """

    def __init__(self, model: nn.Module) -> None:
        """Make an empty bank on a model; nothing in the model changes before the first adapter.

        Raises:
            LoradeckError: the model already has a bank.
        """
        self._host = host(model)
        if hasattr(self._host, RESIDENTS):
            raise LoradeckError("this model already has a bank", hint="Use that bank, or call its detach() first.")
        self.model = model
        self._working_sets = WorkingSets()
        self._residents = AdapterContainer(self._moved)
        self._host.add_module(RESIDENTS, self._residents)
        self._layers: dict[str, LoraLayer] = {}
        self._open: set[Route] = set()
        self._unswept = False  # an adapter was unloaded under an open route
        self._fitting: Memo[Mapping[str, TargetModule], dict[str, Form]] = Memo()
        self._own_weights: dict[str, nn.Parameter] = {}  # the base's, while adapters are merged into it
        self._lock = RLock()

    def __getstate__(self) -> dict[str, object]:
        """A copy of an attached model has a bank of its own; locks cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=RLock())
        self._open.clear()  # open routes are the original's

    # ---- what is here

    def names(self) -> list[str]:
        """Return the names of all resident adapters, in the order they came."""
        return self._residents.names()

    def __contains__(self, name: str) -> bool:
        return name in self._residents

    def __len__(self) -> int:
        return len(self.names())

    def __getitem__(self, name: str) -> Adapter:
        """Return the adapter of this name.

        Raises:
            UnknownAdapterError: there is none; close names are listed.
        """
        adapter = self._residents.get(name)
        if adapter is None:
            close = difflib.get_close_matches(name, self.names(), n=3) or self.names()[:8]
            raise UnknownAdapterError(
                f"no adapter is named {name!r}",
                hint=f"Resident: {', '.join(close) or 'none'}. Load one with bank.load.",
            )
        return adapter

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Return an adapter's trainable tensors, for any optimizer.

        Raises:
            AdapterError: the adapter is frozen.
        """
        adapter = self[name]
        if not adapter.trainable:
            raise AdapterError(
                f"{name!r} is frozen", hint="Load it with bank.load(folder, trainable=True) to train it."
            )
        return adapter.parameters()

    # ---- coming and going

    def add(self, name: str, adapter: LoraConfig | Adapter, *, generator: torch.Generator | None = None) -> Adapter:
        """Add a fresh trainable adapter for a config, or an adapter made elsewhere.

        A fresh adapter changes nothing until it is trained. `generator` draws its initial values and its dropout
        (by default torch's global one).

        Raises:
            TargetError: the config's targets match nothing, or something that takes no adapter.
            AdapterNameError: the name is taken, or cannot be a name.
            AdapterError: a ready-made adapter does not fit this model.
        """
        with self._lock:
            self._check_new(name)
            if isinstance(adapter, Adapter):
                forms = self._fit(adapter.sites, "This adapter")
            else:
                self._check_unmerged()
                forms = targets.resolve(self.model, adapter)
                adapter = init.adapter(self.model, adapter, forms, generator)
            self._take(name, adapter, forms)
            return adapter

    def load(
        self, folder: str | Path, name: str | None = None, *, trainable: bool = False, any_base: bool = False
    ) -> str:
        """Load a PEFT folder and return the adapter's name (by default the folder's).

        All or nothing: after an error the bank is as it was. `any_base` loads an adapter whose record says that it
        was trained on another base.

        Raises:
            UnsupportedError: the adapter uses something this library does not implement.
            AdapterError: with every problem found.
            AdapterNameError: the name is taken, or cannot be a name.
        """
        folder = Path(folder)
        try:
            name = folder.resolve().name if name is None else name
        except (OSError, ValueError, RuntimeError) as error:  # a zero byte, or a loop of links
            raise AdapterError(f"{str(folder)!r} is no folder: {error}") from None
        self._check_new(name)
        listing = read_folder(folder)
        compatibility.check_base(self.model, listing, any_base=any_base)
        with self._lock:
            self._fit(listing.sites, str(folder))
        # Read without the lock: the disk may be slow, and others unload in the meantime.
        adapter = Adapter.from_listing(
            listing, trainable=trainable, check_copy=partial(compatibility.copy_problem, self.model)
        )
        if trainable:
            init.prepare(adapter, generator=None)
        with self._lock:
            self._check_new(name)
            self._take(name, adapter, self._fit(listing.sites, str(folder)))
        return name

    def save(self, name: str, folder: str | Path, **provenance: str) -> Path:
        """Write an adapter as a PEFT folder, in one step. `provenance` is kept with the tensors.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterError: a tensor is not finite, or the folder cannot be written.
        """
        adapter = self[name]
        if provenance:
            adapter.describe(**provenance)
        return adapter.save(folder)

    def unload(self, name: str) -> None:
        """Let an adapter go, with its memory; routes that are open keep it until they end."""
        with self._lock:
            adapter = self[name]
            self._residents.remove(name)
            self._working_sets.forget(adapter)
            self._sweep()

    def _sweep(self) -> None:
        """Give back the modules that neither a resident adapter nor one of an open route needs."""
        with self._lock:
            members = {adapter for route in [*self._open] for adapter in route.members}
            needed = [self[name] for name in self.names()] + [*members]
            shapes = {id(adapter.sites): adapter.sites for adapter in needed}  # few, and shared
            wanted = {path for sites in shapes.values() for path in sites}
            for path in self._layers.keys() - wanted:
                self._layers.pop(path).detach()
                self._fitting.clear()
            self._unswept = bool(members.difference(self[name] for name in self.names()))

    def _moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._working_sets.clear()
        for parameter in self._own_weights.values():  # set aside by a merge, they move with the model all the same
            parameter.data = fn(parameter.data)

    def _enter(self, route: Route) -> None:
        if route.members:
            self._check_unmerged()
        self._open.add(route)

    def _leave(self, route: Route) -> None:
        self._open.discard(route)
        if self._unswept:
            self._sweep()

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        with self._lock:
            self[old]
            if new != old:
                self._check_new(new)
                self._residents.rename(old, new)

    def detach(self) -> None:
        """Take everything off the model: it is, bit for bit, what it was."""
        with self._lock:
            self.unmerge()
            for layer in self._layers.values():
                layer.detach()
            self._layers.clear()
            self._working_sets.clear()
            self._residents.clear()
            if getattr(self._host, RESIDENTS, None) is self._residents:
                delattr(self._host, RESIDENTS)

    # ---- using them

    def route(
        self, rows: RouteEntry | Sequence[RouteEntry], *, lengths: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """Send each row of the batch through its own adapters, in this thread, until the block ends.

        `rows` is one entry for the whole batch or a list with one per row: a name, None for the base, or
        {name: weight}. With `lengths` each entry is a segment of that many tokens of one packed row. Rows that are
        multiplied (beams, return sequences) keep their entry. The innermost route counts.

        Raises:
            UnknownAdapterError: a name that is not resident.
            RouteError: an entry that is none, or adapters are merged into the base.
        """
        entries, sizes = entries_of(rows, lengths)
        weighted = [tuple((self[name], weight) for name, weight in weights_of(entry)) for entry in entries]
        if any(weighted):
            self._check_unmerged()
        route = self._working_sets.route(self, weighted, sizes, packed=lengths is not None)
        return opened(route, self._enter, self._leave)

    def merge(self, entry: str | Blend) -> None:
        """Fold an adapter, or a blend, into the base's weights, for a model without any extra cost per step.

        Until `unmerge`, which restores the base bit for bit, the base's own weights are kept beside the merged ones,
        and a row routed to None goes through the merged model.

        Raises:
            RouteError: something is merged already, or a route to an adapter is open: its rows would get both.
            UnsupportedError: a weight that cannot be merged into.
        """
        with self._lock:
            self._check_unmerged()
            if any(route.members for route in [*self._open]):
                raise RouteError("a route is open", hint="Merge outside of any route.")
            weighted = [(self[name], weight) for name, weight in weights_of(entry)]
            forms = {path: layer.form for path, layer in self._layers.items()}
            self._own_weights = merge.fold(self.model, forms, weighted)

    def unmerge(self) -> None:
        """Put the base's own weights back, bit for bit; without a merge, do nothing."""
        with self._lock:
            merge.unfold(self.model, self._own_weights)
            self._own_weights = {}

    def combine(
        self,
        weights: Blend,
        *,
        name: str,
        method: Method = "concat",
        r: int | None = None,
        density: float = 0.5,
        seed: int = 0,
    ) -> Combination:
        """Make a new resident adapter `name` of several, each at a weight: see `loradeck.lora.combine`."""
        with self._lock:
            self._check_new(name)
            weighted = [(self[other], weight) for other, weight in weights.items()]
            result = combine(weighted, method=method, r=r, density=density, seed=seed)
            adapter = result.adapter
            shortest = targets.suffixes(self.model, [*adapter.sites])
            adapter.config = replace(adapter.config, target_modules=shortest)
            init.stamp(self.model, adapter)
            self.add(name, adapter)
            return result

    def _check_new(self, name: str) -> None:
        check_name(name)
        if name in self:
            raise AdapterNameError(f"{name!r} is resident already", hint="Take another name, or unload that one first.")

    def _check_unmerged(self) -> None:
        if self._own_weights:
            raise RouteError("adapters are merged into the base", hint="Call bank.unmerge() first.")

    def _fit(self, sites: Mapping[str, TargetModule], what: str) -> dict[str, Form]:
        own = {path: layer.form for path, layer in self._layers.items()}
        return self._fitting.get(sites, lambda: compatibility.forms(self.model, own, sites, what))

    def _take(self, name: str, adapter: Adapter, forms: Mapping[str, Form]) -> None:
        for path, form in forms.items():
            if path not in self._layers:
                self._layers[path] = LoraLayer(self, path, self.model.get_submodule(path), form, self._open)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        if device != torch.device("cpu"):
            adapter.to(device)
        self._residents.put(name, adapter)
