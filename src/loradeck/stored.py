"""One version of an adapter on disk: what can be told of it without reading its tensors. Needs no torch.

What was read of a folder is kept only while its files look unchanged, for this process; the disk is asked every time.
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from loradeck.errors import AdapterError
from loradeck.lora.manifest import INDEX, AdapterFiles, read_folder
from loradeck.lora.peft import CONFIG, TENSORS

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

REMEMBERED = 1 << 14  # folders whose facts are kept; about a kilobyte each
SETTLED = 1_000_000_000  # ns; files written twice within a tick of the file system's clock look unchanged

T = TypeVar("T")
Stamp = tuple[tuple[str, int, int, int, int], ...]  # of each file: name, bytes, mtime_ns, ctime_ns, inode


@dataclass(frozen=True, slots=True)
class Facts:
    """What a folder's headers say."""

    r: int
    """The largest rank of its modules."""
    lora_alpha: float
    targets: tuple[str, ...]
    """The last parts of its modules' paths."""
    nbytes: int
    """Of all tensors."""
    base_model: str | None
    base_fingerprint: str | None
    """See `Base.fingerprint`; None where the adapter's record has none."""


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
    recorded: str | None = field(default=None, repr=False, compare=False)
    """The sha256 that publishing kept, if the files still are what they were then."""

    @property
    def spec(self) -> str:
        """What `AdapterStore.find` finds it by, whatever is published later."""
        return f"{self.name}@{self.version}"

    @property
    def created(self) -> float:
        """When its newest file was written, in seconds since 1970."""
        return max(mtime for _, _, mtime, _, _ in self.stamp) / 1e9

    def sha256(self) -> str:
        """Return the identity of its content, for keys of caches: recorded, or else computed from the files.

        It is what `sha256sum adapter_config.json adapter_model.safetensors | sha256sum` prints in the folder.
        Asked after a load, it vouches for what was loaded.

        Raises:
            AdapterError: the files are no longer those that were found.
        """
        digest = self.recorded or _remembered(_sha256, self.path, self.stamp)
        if stamp(self.path) != self.stamp:
            raise AdapterError(f"{self.path} has changed since it was found", hint="Find it again.")
        return digest


class Record(msgspec.Struct, frozen=True):
    """What publishing keeps beside a version: its sha256, and by which files it is known to hold still."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    files: tuple[tuple[str, int, int], ...]
    """Name, bytes and mtime_ns: what a copy by `rsync -a` keeps."""

    @classmethod
    def of(cls, digest: str, stamp: Stamp) -> "Record":
        """Record the sha256 of files that look like this."""
        return cls(digest, tuple((name, size, mtime) for name, size, mtime, _, _ in stamp))


def read_stored(name: str, version: int, path: Path, record: Path | None) -> Stored:
    """Read the headers of the folder at `path`, and its record where there is one.

    Raises:
        AdapterError: with every problem found in the headers.
    """
    now = stamp(path)
    recorded = _recorded(record, now) if record else None
    return Stored(name, version, path, _remembered(_facts, path, now), now, recorded)


def is_adapter(folder: Path) -> bool:
    """Say whether a folder means to be an adapter, whole or not."""
    try:
        return (folder / CONFIG).exists()
    except OSError:
        return True  # a folder that may not be looked into: reading it says so


def files_of(listing: AdapterFiles) -> list[str]:
    """Return the names of the files that an adapter computes with."""
    tensors = [header.path.name for header in listing.headers]
    return sorted([CONFIG, *tensors, *([INDEX] if tensors != [TENSORS] else [])])


def digest_of(folder: Path, files: Sequence[str]) -> str:
    """Return one sha256 of these files' names and bytes."""
    digest = hashlib.sha256()
    for name in files:
        with (folder / name).open("rb") as file:
            digest.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


def stamp(folder: Path) -> Stamp:
    """Return what changes whenever a file of the adapter does.

    Raises:
        AdapterError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            seen = [(e.name, e.stat()) for e in entries if e.name.endswith((".json", ".safetensors")) and e.is_file()]
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read: {error.strerror}") from error
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in seen))


def _recorded(record: Path, now: Stamp) -> str | None:
    try:
        kept = msgspec.json.decode(record.read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None  # a record only saves time
    return kept.sha256 if kept == Record.of(kept.sha256, now) else None


def _remembered(question: "_lru_cache_wrapper[T]", path: Path, now: Stamp) -> T:
    settled = all(time.time_ns() - max(mtime, ctime) > SETTLED for _, _, mtime, ctime, _ in now)
    answer: Callable[[Path, Stamp], T] = question if settled else question.__wrapped__
    return answer(path, now)


@lru_cache(REMEMBERED)
def _facts(path: Path, _: Stamp) -> Facts:
    listing = read_folder(path)
    return Facts(
        r=max(site.r for site in listing.sites.values()),
        lora_alpha=listing.config.lora_alpha,
        targets=tuple(sorted({module.rpartition(".")[2] for module in listing.sites})),
        nbytes=listing.nbytes,
        base_model=listing.origin.base_model,
        base_fingerprint=listing.origin.provenance.get("base_fingerprint"),
    )


@lru_cache(REMEMBERED)
def _sha256(path: Path, _: Stamp) -> str:
    return digest_of(path, files_of(read_folder(path)))
