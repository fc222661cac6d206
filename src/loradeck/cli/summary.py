"""A summary of an adapter's folder from its headers, without torch."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from loradeck.lora.manifest import AdapterFiles, TargetModule


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One line of `loradeck ls`."""

    name: str
    folder: str
    r: list[int]
    lora_alpha: float
    targets: list[str]
    modules: int
    parameters: int
    bytes: int
    base: str | None


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


def summarise(listing: AdapterFiles) -> Summary:
    """Return an adapter's line of `loradeck ls`."""
    return Summary(
        name=listing.folder.resolve().name,
        folder=str(listing.folder),
        r=sorted({site.r for site in listing.sites.values()}),
        lora_alpha=listing.config.lora_alpha,
        targets=sorted({path.rpartition(".")[2] for path in listing.sites}),
        modules=len(listing.sites),
        parameters=listing.parameters,
        bytes=listing.nbytes,
        base=listing.origin.base_model,
    )


def kinds(sites: Iterable[tuple[str, TargetModule]]) -> list[Kind]:
    """Return the kinds of modules in the order of the file."""
    counts = Counter((pattern(path), site) for path, site in sites)
    return [Kind(modules=modules, count=count, **asdict(site)) for (modules, site), count in counts.items()]


def pattern(path: str) -> str:
    """Return a module's path with its numbers as stars."""
    return re.sub(r"\b\d+\b", "*", path)


def config(listing: AdapterFiles) -> dict[str, Any]:
    """Return an adapter's settings, without the empty ones."""
    return {key: value for key, value in asdict(listing.config).items() if value not in (None, (), {}, "")}
