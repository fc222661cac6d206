"""One version of an adapter on disk, as read from its headers. Needs no torch.

Headers are cached per process for as long as the folder's files look unchanged; the disk is asked every time.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from loradeck.disk import Stamp, is_settled
from loradeck.errors import AdapterError
from loradeck.lora.folder import CONFIG, TENSORS
from loradeck.lora.manifest import INDEX, AdapterFiles, read_folder, stamp
from loradeck.tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

RESULTS = ("loss", "validation_loss", "accuracy", "margin", "steps", "tokens")  # as training records them
CACHED_FOLDERS = 1 << 14  # about a kilobyte each

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a folder's headers say."""

    ranks: tuple[int, ...]
    """The ranks of its modules, sorted, each once."""
    lora_alpha: float
    targets: tuple[str, ...]
    """The last parts of its modules' paths."""
    nbytes: int
    """Of all tensors."""
    parameters: int
    """Number of trained values."""
    parameter_bytes: int
    """Of the trained values: those of copies of the base's weights are never kept in memory."""
    base_model: str | None
    base_fingerprint: str | None
    """See `Base.fingerprint`; None if the adapter does not record one."""
    base_quantisation: str | None
    """How that base was quantised; None if it was not."""
    labels: tuple[str, ...]
    """The names of a classifier's labels; () if the adapter does not record any."""
    modules: int
    """Number of modules that it adapts."""
    has_weights: bool
    """Whether it has whole weights of modules, which may have rows for tokens that the base has not."""
    dataset: str | None
    """The dataset that it was trained on, as training recorded it."""
    results: tuple[tuple[str, float], ...]
    """How its training went: see `results_of`."""

    @property
    def r(self) -> int:
        """The largest rank of its modules."""
        return self.ranks[-1]


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of an adapter on disk; two are equal while its files are the same."""

    name: str
    version: int
    """0 for a folder that was never published."""
    path: Path
    """A PEFT folder, for `bank.load(path, name)`."""
    facts: Facts
    stamp: Stamp = field(repr=False)
    recorded_sha256: str | None = field(default=None, repr=False, compare=False)
    """The sha256 that publishing recorded; None if there is none, or the files have changed since."""
    commit: str | None = None
    """That of an adapter of the hub."""
    is_here: bool = True
    """Whether its files are on this machine; those of a listed version of a store elsewhere may not be."""
    hold: object = field(default=None, repr=False, compare=False)
    """Keeps its files in the cache of a store elsewhere."""

    @property
    def spec(self) -> str:
        """The name with which this version is found, whatever is published later."""
        return f"{self.name}@{self.version if self.commit is None else self.commit}"

    @property
    def created(self) -> float:
        """When its newest file was written, in seconds since 1970."""
        return max(mtime for _, _, mtime, _, _ in self.stamp) / 1e9

    @property
    def tokenizer_files(self) -> TokenizerFiles:
        """The files of its own tokenizer and chat template."""
        return TokenizerFiles.of(self.path, self.stamp)

    def equals(self, other: "Stored") -> bool:
        """Return whether another adapter has the same content, its tokenizer included. Reads the disk.

        Raises:
            AdapterError: the files of one have changed since they were found.
        """
        return self.sha256() == other.sha256() and self.tokenizer_files.read() == other.tokenizer_files.read()

    def sha256(self) -> str:
        """Return the identity of its content, for cache keys: as recorded, else computed from the files.

        In the folder, `sha256sum adapter_config.json adapter_model.safetensors | sha256sum` prints the same. Called
        after a load, it also confirms that what was loaded has this identity.

        Raises:
            AdapterError: the files have changed since they were found.
        """
        if not self.is_here and self.recorded_sha256:
            return self.recorded_sha256  # they cannot change
        digest = self.recorded_sha256 or _cached(_sha256, self.path, self.stamp)
        if stamp(self.path) != self.stamp:
            raise AdapterError(f"{self.path} has changed since it was found", hint="Find it again.")
        return digest


class VersionRecord(msgspec.Struct, frozen=True):
    """The file that publishing writes beside a version: its sha256, and how the files looked then."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    files: tuple[tuple[str, int, int], ...]
    """Name, bytes and mtime_ns, which a copy by `rsync -a` preserves."""

    @classmethod
    def of(cls, digest: str, stamp: Stamp) -> "VersionRecord":
        """Record the sha256 of files with this stamp."""
        return cls(digest, tuple((name, size, mtime) for name, size, mtime, _, _ in stamp))


def read_stored(name: str, version: int, path: Path, record: Path | None) -> Stored:
    """Read the headers of the folder at `path`, and its record if there is one.

    Raises:
        AdapterError: with every problem found in the headers.
    """
    now = stamp(path)
    recorded = _read_record(record, now) if record else None
    return Stored(name, version, path, _cached(_facts, path, now), now, recorded)


def files_of(listing: AdapterFiles) -> list[str]:
    """Return the names of the files that decide what an adapter computes."""
    tensors = [header.path.name for header in listing.headers]
    return sorted([CONFIG, *tensors, *([INDEX] if tensors != [TENSORS] else [])])


def digest_of(folder: Path, files: Sequence[str]) -> str:
    """Return one sha256 of these files' names and bytes."""
    digest = hashlib.sha256()
    for name in files:
        with (folder / name).open("rb") as file:
            digest.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


def results_of(provenance: Mapping[str, str]) -> dict[str, float]:
    """Return how a training went, as far as an adapter's metadata records it, which may come from a stranger."""
    return {key: number for key in RESULTS if (number := _number(provenance.get(key))) is not None}


def _number(text: str | None) -> float | None:
    """Return the number in a text; None if it is none."""
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if isfinite(number) else None


def _read_record(path: Path, now: Stamp) -> str | None:
    try:
        record = msgspec.json.decode(path.read_bytes(), type=VersionRecord)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None  # a record only saves time
    return record.sha256 if record == VersionRecord.of(record.sha256, now) else None


def _cached(function: "_lru_cache_wrapper[T]", path: Path, now: Stamp) -> T:
    """Call a cached function of a folder, past its cache while the files may still be changing."""
    call: Callable[[Path, Stamp], T] = function if is_settled(now) else function.__wrapped__
    return call(path, now)


@lru_cache(CACHED_FOLDERS)
def _facts(path: Path, _: Stamp) -> Facts:
    listing = read_folder(path)
    provenance = listing.origin.provenance
    return Facts(
        ranks=tuple(sorted({site.r for site in listing.sites.values()})),
        lora_alpha=listing.config.lora_alpha,
        targets=tuple(sorted({module.rpartition(".")[2] for module in listing.sites})),
        nbytes=listing.nbytes,
        parameters=listing.parameters,
        parameter_bytes=listing.parameter_bytes,
        base_model=listing.origin.base_model,
        base_fingerprint=provenance.get("base_fingerprint"),
        base_quantisation=provenance.get("base_quantisation"),
        labels=listing.origin.labels,
        modules=len(listing.sites),
        has_weights=bool(listing.copies or listing.saved),
        dataset=provenance.get("dataset"),
        results=tuple(results_of(provenance).items()),
    )


@lru_cache(CACHED_FOLDERS)
def _sha256(path: Path, _: Stamp) -> str:
    return digest_of(path, files_of(read_folder(path)))
