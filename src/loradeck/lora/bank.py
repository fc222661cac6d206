"""The adapters resident on one model: loading, saving, routing, merging."""

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
from loradeck.lora import compatibility, hub, init, merge, targets, vocabulary
from loradeck.lora.adapter import Adapter
from loradeck.lora.combine import Combination, Method, combine
from loradeck.lora.config import LoraConfig
from loradeck.lora.container import AdapterContainer, host
from loradeck.lora.layer import LoraLayer
from loradeck.lora.manifest import AdapterFiles, TargetModule, read_folder
from loradeck.lora.memo import Memo
from loradeck.lora.names import check_name, default_name
from loradeck.lora.routing import Blend, Route, RouteEntry, entries_of, kept_of, opened, weights_of
from loradeck.lora.saved_modules import replacement
from loradeck.lora.vocabulary import Vocabulary, rows_of
from loradeck.lora.working_set import WorkingSets
from loradeck.ops.layer_kinds import LayerKind

RESIDENTS = "loradeck"  # the name of the container in the model


class Bank:
    """Many adapters on one frozen model; each row of a batch goes through its own, by `route`.

    Outside a route, and for rows routed to None, the model is exactly the base.
    """

    def __init__(self, model: nn.Module) -> None:
        """Create an empty bank on a model; the model is unchanged until the first adapter.

        Raises:
            LoradeckError: the model already has a bank.
        """
        self._host = host(model)
        if hasattr(self._host, RESIDENTS):
            raise LoradeckError("this model already has a bank", python="Use that bank, or call its detach() first.")
        self.model = model
        self.vocabulary = vocabulary.modules(model)
        """Its embedding and head by their paths, where adapters may have rows for more tokens."""
        self._working_sets = WorkingSets()
        self._residents = AdapterContainer(self._moved)
        self._host.add_module(RESIDENTS, self._residents)
        self._layers: dict[str, LoraLayer] = {}
        self._open: set[Route] = set()
        self._sweep_later = False  # an adapter was unloaded while a route to it was open
        self._fitting: Memo[Mapping[str, TargetModule], dict[str, LayerKind]] = Memo()
        self._lacking: Memo[tuple[LoraConfig, object, Mapping[str, TargetModule]], list[str]] = Memo()
        self._respelling: Memo[tuple[Mapping[str, TargetModule], Sequence[str]], Mapping[str, str]] = Memo()
        self._unmerged: dict[str, nn.Parameter] = {}  # the base's weights, while adapters are merged into it
        self._lock = RLock()

    def __getstate__(self) -> dict[str, object]:
        """Copying a model copies its bank; locks cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=RLock())
        self._open.clear()  # open routes are the original's

    # ---- residents

    def names(self) -> list[str]:
        """Return the names of all resident adapters, in the order of addition."""
        return self._residents.names()

    def __contains__(self, name: str) -> bool:
        return name in self._residents

    def __len__(self) -> int:
        return len(self.names())

    def __getitem__(self, name: str) -> Adapter:
        """Return the adapter of this name.

        Raises:
            UnknownAdapterError: the name is unknown; close names are listed.
        """
        adapter = self._residents.get(name)
        if adapter is None:
            close = difflib.get_close_matches(name, self.names(), n=3) or self.names()[:8]
            raise UnknownAdapterError(
                f"unknown adapter {name!r}",
                hint=f"Loaded: {', '.join(close)}." if close else "No adapter is loaded.",
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
                f"{name!r} is frozen", python="Load it with bank.load(folder, trainable=True) to train it."
            )
        return adapter.parameters()

    # ---- adding and removing

    def add(
        self,
        name: str,
        adapter: LoraConfig | Adapter,
        *,
        num_labels: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Adapter:
        """Add a new trainable adapter for a config, or an existing Adapter.

        A new adapter does not change the output until it is trained, but for a head of modules_to_save with another
        number of outputs, `num_labels`, than the base's, or that the base lacks. If modules_to_save is empty, these two
        make it the model's head. `generator` draws its initial values and its dropout; torch's global one by default.

        Raises:
            TargetError: the config's targets match no module, or one that takes no adapter.
            AdapterNameError: the name is taken or invalid.
            AdapterError: the adapter does not fit this model.
        """
        with self._lock:
            self._check_new(name)
            if isinstance(adapter, Adapter):
                kinds = self._fit(adapter.sites, "This adapter")
                saved = {path: adapter.saved_module(path) for path in adapter.saved}
                compatibility.check_saved(self.model, saved, "This adapter")
            else:
                self._check_unmerged()
                adapter = init.with_head(self.model, adapter, num_labels)
                kinds = targets.resolve(self.model, adapter)
                adapter = init.adapter(self.model, adapter, kinds, generator, num_labels=num_labels)
            self._take(name, adapter, kinds)
            return adapter

    def load(
        self, folder: str | Path, name: str | None = None, *, trainable: bool = False, any_base: bool = False
    ) -> str:
        """Load a PEFT folder and return the adapter's name, by default the folder's up to any `@`, as in poet@2.

        A text may be a hub id, as owner/name or owner/name@revision: see `loradeck.lora.hub`. All or nothing: after
        an error the bank is unchanged. `any_base` accepts an adapter that was trained on another base. The log warns of
        modules that the adapter targets and has no tensors for.

        Raises:
            UnsupportedError: the adapter uses a feature that is not supported.
            AdapterError: with every problem found.
            AdapterNameError: the name is taken or invalid.
        """
        try:
            name = default_name(Path(folder)) if name is None else name
        except (OSError, ValueError, RuntimeError) as error:  # a null byte, or a loop of links
            raise AdapterError(f"{str(folder)!r} is not a folder: {error}") from None
        self._check_new(name)
        folder = hub.local(folder)
        files = self.check(folder, any_base=any_base)
        # Read without the lock: the disk may be slow, and other threads may unload meanwhile.
        any_values = compatibility.untrained_copies(files) if any_base else ()
        check_copy = partial(compatibility.why_not_a_copy, self.model, any_values=any_values)
        adapter = Adapter.from_files(files, trainable=trainable, check_copy=check_copy)
        if trainable:
            init.prepare(adapter, generator=None)
        scope = files.config, files.targets, files.sites
        lacking = self._lacking.get(scope, lambda: compatibility.lacking(self.model, files))
        with self._lock:
            self._check_new(name)
            self._take(name, adapter, self._fit(files.sites, str(folder)))
        compatibility.warn_of_gaps(files, lacking)
        return name

    def check(self, folder: str | Path, *, any_base: bool = False) -> AdapterFiles:
        """Check by its headers that a PEFT folder is complete and fits this model; return what they say.

        Its modules are spelled as this model's, even where the folder spells them otherwise.

        Raises:
            UnsupportedError, AdapterError: as `load`.
        """
        files = read_folder(folder, self._has)
        with self._lock:
            paths = self._respelling.get(
                (files.sites, (*files.copies, *files.saved)),
                lambda: compatibility.respelling(self.model, self._adapted(), files),
            )
            files = vocabulary.fitted(self.vocabulary, files.respelled(paths))
            self._fit(files.sites, str(folder), files.spellings)
        shapes = {
            path: {name: torch.empty(files.entries[key][1].shape, device="meta") for name, key in keys.items()}
            for path, keys in files.saved.items()
        }
        compatibility.check_saved(self.model, shapes, str(folder))
        compatibility.check_base(self.model, files, any_base=any_base)
        return files

    def save(self, name: str, folder: str | Path, **provenance: str) -> Path:
        """Write an adapter as a PEFT folder, atomically. `provenance` is saved with the tensors.

        Raises:
            UnknownAdapterError: the name is unknown.
            AdapterError: a tensor is not finite, or the folder cannot be written.
        """
        adapter = self[name]
        if provenance:
            adapter.describe(**provenance)
        return adapter.save(folder)

    def unload(self, name: str) -> None:
        """Remove an adapter and free its memory; open routes keep it until they end."""
        with self._lock:
            adapter = self[name]
            self._residents.remove(name)
            self._working_sets.forget(adapter)
            self._sweep()

    def _sweep(self) -> None:
        """Restore the modules that no adapter needs any more, resident or of an open route."""
        with self._lock:
            members = {adapter for route in [*self._open] for adapter in route.members}
            adapters = [self[name] for name in self.names()] + [*members]
            shapes = {id(adapter.sites): adapter.sites for adapter in adapters}  # few, and shared
            needed = {path for sites in shapes.values() for path in sites}
            needed.update(path for adapter in adapters for path in adapter.replacements)
            for path in self._layers.keys() - needed:
                self._layers.pop(path).detach()
                self._fitting.clear()
            self._sweep_later = bool(members.difference(self[name] for name in self.names()))

    def _moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._working_sets.clear()
        for parameter in self._unmerged.values():  # they move with the model too
            parameter.data = fn(parameter.data)

    def _enter(self, route: Route) -> None:
        if route.members:
            self._check_unmerged()
        self._open.add(route)

    def _leave(self, route: Route) -> None:
        self._open.discard(route)
        if self._sweep_later:
            self._sweep()

    def rename(self, old: str, new: str) -> None:
        """Rename an adapter."""
        with self._lock:
            self[old]
            if new != old:
                self._check_new(new)
                self._residents.rename(old, new)

    def detach(self) -> None:
        """Remove all adapters and restore the model, bit for bit."""
        with self._lock:
            self.unmerge()
            for layer in self._layers.values():
                layer.detach()
            self._layers.clear()
            self._working_sets.clear()
            self._residents.clear()
            if getattr(self._host, RESIDENTS, None) is self._residents:
                delattr(self._host, RESIDENTS)

    # ---- routes and merging

    def route(
        self,
        rows: RouteEntry | Sequence[RouteEntry],
        *,
        lengths: Sequence[int] | None = None,
        logits_to_keep: Sequence[int] | None = None,
    ) -> AbstractContextManager[None]:
        """Route each row of the batch through its own adapters, in this thread, until the block ends.

        `rows` is one entry for the whole batch, or a list with one per row: a name, None for the base, or
        {name: weight}. With `lengths`, each entry is a segment of that many tokens of one packed row; give also
        how many of each segment's tokens reach the output head if a `logits_to_keep` of the model selects some. Rows
        that are multiplied (beams, return sequences) keep their entry. Routes nest; the innermost applies.

        Raises:
            UnknownAdapterError: a name is not resident.
            RouteError: an entry is invalid, or adapters are merged into the base.
        """
        entries, sizes = entries_of(rows, lengths)
        weighted = [tuple((self[name], weight) for name, weight in weights_of(entry)) for entry in entries]
        if any(weighted):
            self._check_unmerged()
        packed = lengths is not None
        kept = kept_of(logits_to_keep, sizes if packed else ())
        route = Route.of(self, self._working_sets, weighted, sizes, packed=packed, logits_to_keep=kept)
        return opened(route, self._enter, self._leave)

    def merge(self, entry: str | Blend) -> None:
        """Merge an adapter, or a blend, into the base's weights, so that it costs nothing per step.

        Until `unmerge`, which restores the base bit for bit, the original weights are kept in memory too, and rows
        routed to None use the merged model.

        Raises:
            RouteError: adapters are merged already, or a route to an adapter is open: its rows would get both.
            UnsupportedError: a weight cannot be merged into.
        """
        with self._lock:
            self._check_unmerged()
            if any(route.members for route in [*self._open]):
                raise RouteError("a route is open", hint="Merge outside of any route.")
            weighted = [(self[name], weight) for name, weight in weights_of(entry)]
            kinds = {path: layer.kind for path, layer in self._layers.items() if layer.kind}
            self._unmerged = merge.fold(self.model, kinds, weighted)

    def unmerge(self) -> None:
        """Restore the base's weights, bit for bit; do nothing if no adapter is merged."""
        with self._lock:
            merge.unfold(self.model, self._unmerged)
            self._unmerged = {}

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
        """Combine several adapters, each at a weight, into a new resident adapter: see `loradeck.lora.combine`."""
        with self._lock:
            self._check_new(name)
            weighted = [(self[other], weight) for other, weight in weights.items()]
            result = combine(weighted, method=method, r=r, density=density, seed=seed)
            init.stamp(self.model, result.adapter)
            self.add(name, result.adapter)
            return result

    def _check_new(self, name: str) -> None:
        check_name(name)
        if name in self:
            raise AdapterNameError(
                f"{name!r} is already resident", hint="Use another name, or unload that adapter first."
            )

    def _check_unmerged(self) -> None:
        if self._unmerged:
            raise RouteError("adapters are merged into the base", python="Call bank.unmerge() first.")

    def _has(self, path: str) -> bool:
        try:
            self.model.get_submodule(path)
        except AttributeError:
            return False
        return True

    def _adapted(self) -> dict[str, LayerKind]:
        return {path: layer.kind for path, layer in self._layers.items() if layer.kind}

    def _fit(
        self, sites: Mapping[str, TargetModule], what: str, spellings: Mapping[str, str] = {}
    ) -> dict[str, LayerKind]:
        fit = partial(compatibility.layer_kinds, self.model, self._adapted(), sites, what, spellings)
        return self._fitting.get(sites, fit)

    def _kind(self, path: str) -> LayerKind | None:
        """Return the kind of the module at a path, None if it takes no pair."""
        kind = targets.check(self.model, path, targets.closed(self.model))
        return None if isinstance(kind, str) else kind

    def _take(self, name: str, adapter: Adapter, kinds: Mapping[str, LayerKind]) -> None:
        head = targets.output_head(self.model)
        extensions = vocabulary.extensions(self.vocabulary, adapter, name)
        adapter.base_modules = {path: self.vocabulary[path] for path in extensions}
        adapter.replacements = {**extensions}
        for path in adapter.saved:
            module = self.model.get_submodule(path)
            adapter.replacements[path] = replacement(module, adapter.saved_module(path))
        adapter.added_tokens = vocabulary.added_tokens(self.vocabulary, adapter)
        adapter.tokenizer_files = replace(adapter.tokenizer_files, added_tokens=adapter.added_tokens)
        needed: dict[str, LayerKind | None] = {**kinds, **{path: self._kind(path) for path in adapter.replacements}}
        for path, kind in needed.items():
            if path not in self._layers:
                module = self.model.get_submodule(path)
                rows = Vocabulary(rows_of(module), kind) if kind and path in self.vocabulary else None
                self._layers[path] = LoraLayer(
                    self, path, module, kind, self._open, is_head=module is head, vocabulary=rows
                )
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        if device != torch.device("cpu"):
            adapter.to(device)
        self._residents.put(name, adapter)
