"""A summary of an adapter's folder from its headers, without torch."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from loradeck.errors import LoradeckError, UnknownAdapterError
from loradeck.lora.hub import with_hub_ids
from loradeck.lora.manifest import AdapterFiles, TargetModule, copied_module
from loradeck.lora.memo import Memo
from loradeck.lora.safetensors_io import Entry
from loradeck.store import AdapterStore, is_url, split_spec, with_urls
from loradeck.stored import Stored, results_of


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What adapters of equal modules have in common."""

    r: list[int]
    targets: list[str]
    modules: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One line of `loradeck ls`."""

    name: str
    folder: str
    version: int
    """0 for a folder that was never published."""
    r: list[int]
    lora_alpha: float
    targets: list[str]
    modules: int
    parameters: int
    bytes: int
    base: str | None
    dataset: str | None
    results: Mapping[str, float]
    """How its training went, as far as it is recorded: see `results_of`."""
    date: str
    """When its tensors were written, in local time."""
    latest: bool = False
    """Whether its name stands for this version."""
    cannot_be_served: str | None = None
    """Why not, and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The modules of an adapter that differ only in their layer number, as `model.layers.*.mlp.up_proj`."""

    modules: str
    count: int
    kind: str
    r: int
    scaling: float
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


def locate(adapter: str) -> str | Path:
    """Return an adapter's folder: for STORE/NAME or STORE/NAME@latest that of the latest version, else what is given.

    Raises:
        AdapterError: the latest version is unusable.
    """
    path = Path(adapter)
    if is_url(adapter) or os.path.isdir(path) or not os.path.isdir(path.parent):  # noqa: PTH112 (Path.is_dir may raise)
        return adapter
    with suppress(UnknownAdapterError):
        return AdapterStore(path.parent).find(path.name).path
    return adapter


def summarise(listing: AdapterFiles) -> Summary:
    """Return an adapter's line of `loradeck ls`."""
    key = (listing.sites, [header.entries for header in listing.headers])
    shape = _SHAPES.get(key, lambda: _shape(listing))
    folder = str(listing.folder)
    name = listing.folder.name if listing.folder.name.strip(".") else listing.folder.resolve().name
    shown = with_urls(with_hub_ids(folder))
    provenance = listing.origin.provenance
    return Summary(
        name=_readable(name if shown == folder else shown),
        folder=_readable(folder),
        version=split_spec(name)[1],
        r=shape.r,
        lora_alpha=listing.config.lora_alpha,
        targets=shape.targets,
        modules=shape.modules,
        parameters=shape.parameters,
        bytes=listing.nbytes,
        base=listing.origin.base_model,
        dataset=provenance.get("dataset"),
        results=results_of(provenance),
        date=_written(listing),
    )


def summarise_stored(stored: Stored, location: str) -> Summary:
    """Return the line of a version of a store elsewhere, at `location`, whose files may not be here."""
    facts = stored.facts
    return Summary(
        name=stored.spec,
        folder=f"{location}/{stored.spec}",
        version=stored.version,
        r=[*facts.ranks],
        lora_alpha=facts.lora_alpha,
        targets=[*facts.targets],
        modules=facts.modules,
        parameters=facts.parameters,
        bytes=facts.nbytes,
        base=facts.base_model,
        dataset=facts.dataset,
        results=dict(facts.results),
        date=_local_time(stored.created),
    )


def broken(folder: str | Path, error: LoradeckError) -> dict[str, str]:
    """Return the line of an adapter that cannot be read, in a folder or at a URL."""
    name = folder.resolve().name if isinstance(folder, Path) else folder.rpartition("/")[2]
    what = {"name": name, "folder": str(folder), "error": str(error).partition("\n")[0]}
    return {key: _readable(text) for key, text in what.items()}


def kinds(sites: Iterable[tuple[str, TargetModule]]) -> list[Kind]:
    """Return the kinds of modules in the order of the file."""
    counts = Counter((pattern(path), site) for path, site in sites)
    return [Kind(modules=modules, count=count, **asdict(site)) for (modules, site), count in counts.items()]


def whole_weights(listing: AdapterFiles) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the parameters that an adapter has whole, by the paths of their modules.

    They are its own or copies of its base's; a vocabulary that was resized has more rows than the base.
    """
    keys = {path: {**names} for path, names in listing.saved.items()}
    for key in listing.copies:
        keys.setdefault(copied_module(key), {})[key.rpartition(".")[2]] = key
    return {path: {name: listing.entries[key][1].shape for name, key in names.items()} for path, names in keys.items()}


def pattern(path: str) -> str:
    """Return a module's path with its numbers as stars."""
    return re.sub(r"\b\d+\b", "*", path)


def config(listing: AdapterFiles) -> dict[str, Any]:
    """Return an adapter's settings, without the empty ones."""
    return {key: value for key, value in asdict(listing.config).items() if value not in (None, (), {}, "")}


_SHAPES: Memo[tuple[dict[str, TargetModule], list[dict[str, Entry]]], Shape] = Memo(64)


def _shape(listing: AdapterFiles) -> Shape:
    return Shape(
        r=sorted({site.r for site in listing.sites.values()}),
        targets=sorted({path.rpartition(".")[2] for path in listing.sites}),
        modules=len(listing.sites),
        parameters=listing.parameters,
    )


def _written(listing: AdapterFiles) -> str:
    return _local_time(max(header.modified for header in listing.headers))


def _local_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "minutes")


def _readable(path: str) -> str:
    """Return a path with question marks for bytes that are not UTF-8."""
    return path.encode("utf-8", "replace").decode()
