"""Adapters by name and version, in a folder or elsewhere.

In a folder a version is the folder `name@number`, and the highest number is the latest: the rename that makes a version
visible also moves `latest`. A folder without a number is version 0, which was never published. Every call asks the
disk, so changes by other processes are seen at once. Only publishing needs torch. `backends/` has what lies below.
"""

import difflib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loradeck.backends.cached_names import with_urls
from loradeck.backends.folder import NUMBER, RECORDS, split_spec, why_not_served
from loradeck.backends.location import is_url, open_backend
from loradeck.errors import AdapterError, ConfigError, LoradeckError, UnknownAdapterError
from loradeck.lora.manifest import is_adapter
from loradeck.lora.names import check_name
from loradeck.stored import Stored

if TYPE_CHECKING:
    from loradeck.lora.adapter import Adapter

__all__ = [
    "AdapterStore",
    "is_store",
    "is_url",
    "latest_versions",
    "split_spec",
    "versions_beside",
    "why_not_served",
    "with_urls",
]

LATEST = "latest"


class AdapterStore:
    """A folder of adapters, or a place elsewhere with a cache on this machine.

    Any number of threads and processes may read and change it at the same time.
    """

    def __init__(self, folder: str | Path, *, cache_bytes: int | None = None, waiting: int | None = None) -> None:
        """Open a store; the first `publish` creates its folder.

        Args:
            folder: A folder, or a URL: s3://bucket/folder, gs://bucket/folder, hf://owner/repository, file:///folder.
            cache_bytes: Of a store elsewhere, the bytes of files to keep in this machine's cache, which all stores and
                processes share; by default LORADECK_CACHE_BYTES, or 16 GiB. What is in use stays.
            waiting: Of a store elsewhere, how many calls may wait for it at the same time; others get a BusyError. By
                default any number.

        Raises:
            ConfigError: such a URL cannot be used, or its package is missing.
        """
        self._backend = open_backend(folder, cache_bytes, waiting)
        self.location = self._backend.location
        """The folder or URL, as it is shown."""
        self.folder = self._backend.folder
        """A folder of this machine for what is not published yet; for a store in a folder, the folder itself."""

    # ---- queries

    def names(self) -> list[str]:
        """Return the names of all adapters, sorted, including unusable ones (see `problems`).

        Raises:
            AdapterError: the store's folder cannot be read.
        """
        return sorted(name for name in self._backend.catalogue() if why_not_served(name) is None)

    def versions(self, name: str) -> list[int]:
        """Return the numbers of an adapter's versions, the latest last.

        Raises:
            UnknownAdapterError: no such adapter; the hint lists close names.
            AdapterError: the store's folder cannot be read.
        """
        numbers = self._backend.versions(name)
        if not numbers:
            names = self.names()
            close = difflib.get_close_matches(name, names, n=3) or names[:8]
            raise UnknownAdapterError(
                f"no adapter in {self.location} is named {name[:128]!r}",
                hint=f"There are: {', '.join(close) or 'none'}.",
            )
        return numbers

    def find(self, spec: str) -> Stored:
        """Return the version that `name`, `name@latest` or `name@number` currently refers to.

        Raises:
            UnknownAdapterError: no such adapter or version; the hint lists close names, or the latest versions.
            AdapterError: it is unusable; with every problem found in its headers.
        """
        name, number = self._resolve(spec)
        return self._stored_now(spec, name, number)

    def latest(self) -> list[Stored]:
        """Return the latest version of every usable adapter, sorted by name.

        Raises:
            AdapterError: the store's folder cannot be read.
        """
        latest = [(name, max(numbers)) for name, numbers in sorted(self._backend.catalogue().items())]
        adapters = []
        for (name, number), version in self._backend.listed(
            each for each in latest if not why_not_served(each[0])
        ).items():
            if isinstance(version, Stored):
                adapters.append(version)
            elif not self._backend.has(name, number):  # removed since the listing; another may be the latest now
                with suppress(AdapterError, UnknownAdapterError):
                    adapters.append(self.find(name))
        return adapters

    def listed(self, name: str) -> dict[int, Stored | LoradeckError]:
        """Return the versions of an adapter by number, the latest last, or why they are unusable.

        Of a store elsewhere nothing is downloaded: see `Stored.is_here`.

        Raises:
            UnknownAdapterError: no such adapter.
            AdapterError: the store cannot be read.
        """
        versions = self._backend.listed((name, number) for number in self.versions(name))
        return {number: version for (_, number), version in versions.items()}

    def problems(self) -> dict[str, LoradeckError]:
        """Return the reason why each unusable adapter is so, by the name of its folder.

        Raises:
            AdapterError: the store's folder cannot be read.
        """
        return {
            self.path(name, number).name: error
            for (name, number), error in self.contents().items()
            # else another process removed it in between
            if isinstance(error, LoradeckError) and self._backend.has(name, number)
        }

    def contents(self) -> dict[tuple[str, int], Stored | LoradeckError]:
        """Return all versions by name and number, or why they are unusable; of a store elsewhere as `listed` does.

        Raises:
            AdapterError: the store cannot be read.
        """
        catalogue = self._backend.catalogue()
        names = {name: why_not_served(name) for name in catalogue}
        contents: dict[tuple[str, int], Stored | LoradeckError] = {
            (name, number): error for name, error in names.items() if error for number in catalogue[name]
        }
        served = [(name, number) for name, error in names.items() if error is None for number in catalogue[name]]
        return contents | self._backend.listed(served)

    def path(self, name: str, number: int) -> Path:
        """Return the folder of a version, whether it is there or not; number 0 is the unpublished folder."""
        return self._backend.path(name, number)

    # ---- changes

    def publish(self, name: str, source: "Adapter | Path | str") -> Stored:
        """Make an adapter, or a copy of a PEFT folder, the latest version of this name, atomically.

        It is read completely first. Only the adapter's own files are copied: configuration, tensors, card, and those of
        a tokenizer or a chat template beside them.

        Raises:
            AdapterNameError: the name is invalid.
            UnsupportedError: the adapter uses something this library does not implement.
            AdapterError: it cannot be loaded, with every problem found, or the store cannot be changed.
        """
        check_name(name)
        with self._changing():
            if isinstance(source, str | Path):
                return self._backend.publish(name, Path(source))
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=self.folder) as saved:
                return self._backend.publish(name, source.save(Path(saved) / "adapter"))

    def remove(self, spec: str) -> list[int]:
        """Remove one version (`name@3`, `name@latest`), or all of a `name`; return their numbers, not to be used again.

        Files that are not the adapter's stay, such as those of a training run.

        Raises:
            UnknownAdapterError: no such adapter or version.
            AdapterError: the store cannot be changed.
        """
        numbers = self.numbers(spec)
        self._remove(spec.partition("@")[0], numbers)
        return numbers

    def numbers(self, spec: str) -> list[int]:
        """Return the numbers of all versions of a `name`, or the one of `name@3` or `name@latest`.

        Raises:
            UnknownAdapterError: no such adapter or version.
            AdapterError: the store cannot be read.
        """
        name, number = self._resolve(spec)
        return [number] if "@" in spec else self.versions(name)

    def prune(self, name: str, *, keep: int) -> list[int]:
        """Remove all but the `keep` latest published versions; return the numbers of the removed ones.

        Raises:
            ConfigError: `keep` is below 1.
            UnknownAdapterError: no such adapter.
            AdapterError: the store cannot be changed.
        """
        if keep < 1:
            raise ConfigError(f"keep must be at least 1, not {keep}", hint=f"To remove {name!r}, call `remove`.")
        old = [number for number in self.versions(name) if number][:-keep]
        self._remove(name, old)
        return old

    def _remove(self, name: str, numbers: list[int]) -> None:
        with self._changing():
            self._backend.remove(name, numbers)  # oldest first, so that `latest` never goes back

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AdapterError(f"the store {self.location} cannot be changed: {error}") from error

    def _stored_now(self, spec: str, name: str, number: int) -> Stored:
        """Read a version that `spec` was resolved to, or resolve it again if the version was removed since."""
        try:
            return self._backend.read(name, number)
        except AdapterError:
            if self._backend.has(name, number):
                raise
        return self.find(spec)

    def _resolve(self, spec: str) -> tuple[str, int]:
        name, at, which = spec.partition("@")
        numbers = self.versions(name)
        if not at or which == LATEST:
            return name, numbers[-1]
        if (which == "0" or NUMBER.fullmatch(which)) and int(which) in numbers:
            return name, int(which)
        latest = ", ".join(map(str, numbers[-8:]))
        raise UnknownAdapterError(f"{name!r} has no version {which[:20]!r}", hint=f"The latest are: {latest}.")


def latest_versions(folders: Iterable[str]) -> set[str]:
    """Return which of these folders' names are the ones that their adapters' names stand for."""
    latest: dict[str, int] = {}
    for folder in folders:
        name, number = split_spec(folder)
        latest[name] = max(number, latest.get(name, 0))
    return {f"{name}@{number}" if number else name for name, number in latest.items()}


def versions_beside(folder: Path) -> list[str]:
    """Return the names of the folders of all versions of an adapter, if this is the folder of one."""
    name, _ = split_spec(folder.resolve().name)
    if not is_adapter(folder) or why_not_served(name):
        return []
    store = AdapterStore(folder.resolve().parent)
    return [store.path(name, number).name for number in store.versions(name)]


def is_store(folder: Path) -> bool:
    """Return whether a folder is empty or holds adapters, and is none itself."""
    if not folder.is_dir() or is_adapter(folder):
        return False
    inside = [*folder.iterdir()]
    return not inside or any(path.name == RECORDS or is_adapter(path) for path in inside)
