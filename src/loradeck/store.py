"""The adapters in a folder, by name and version.

A version is the folder `name@number`, and the highest number is the latest: the rename that makes a version visible
also moves `latest`. A folder without a number is version 0, which was never published. Every call asks the disk, so
changes by other processes are seen at once. Only publishing needs torch.
"""

import difflib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loradeck import tokenizer_files
from loradeck.disk import new_folder, write_file
from loradeck.errors import AdapterError, AdapterNameError, ConfigError, LoradeckError, UnknownAdapterError
from loradeck.lora.folder import CARD, CONFIG
from loradeck.lora.manifest import TENSOR_FILES, is_adapter, read_folder, stamp
from loradeck.lora.names import check_name, valid_name
from loradeck.stored import Stored, VersionRecord, digest_of, files_of, read_stored
from loradeck.tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    from loradeck.lora.adapter import Adapter

RECORDS = ".versions"  # a file for each number: it claims the number, and records the sha256
LATEST = "latest"
MODEL = "config.json"  # of transformers
NUMBER = re.compile("[1-9][0-9]{0,17}")


class AdapterStore:
    """A folder of adapters. Any number of threads and processes may read and change it at the same time."""

    def __init__(self, folder: str | Path) -> None:
        """Open a store; the first `publish` creates its folder."""
        self.folder = Path(folder).absolute()

    # ---- queries

    def names(self) -> list[str]:
        """Return the names of all adapters, sorted, including unusable ones (see `problems`).

        Raises:
            AdapterError: the store's folder cannot be read.
        """
        return sorted(name for name in self._catalogue() if why_not_served(name) is None)

    def versions(self, name: str) -> list[int]:
        """Return the numbers of an adapter's versions, the latest last.

        Raises:
            UnknownAdapterError: no such adapter; the hint lists close names.
            AdapterError: the store's folder cannot be read.
        """
        numbers = self._versions(name)
        if not numbers:
            names = self.names()
            close = difflib.get_close_matches(name, names, n=3) or names[:8]
            raise UnknownAdapterError(
                f"no adapter in {self.folder} is named {name[:128]!r}", hint=f"There are: {', '.join(close) or 'none'}."
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
        adapters = []
        for name, numbers in sorted(self._catalogue().items()):
            if why_not_served(name) is None:
                with suppress(AdapterError, UnknownAdapterError):
                    adapters.append(self._stored_now(name, name, max(numbers)))
        return adapters

    def problems(self) -> dict[str, LoradeckError]:
        """Return the reason why each unusable adapter is so, by the name of its folder.

        Raises:
            AdapterError: the store's folder cannot be read.
        """
        problems: dict[str, LoradeckError] = {}
        for name, numbers in self._catalogue().items():
            for path, number in ((self.path(name, number), number) for number in numbers):
                error = why_not_served(name)
                try:
                    if error is None:
                        self._stored(name, number)
                except AdapterError as unusable:
                    error = unusable
                if error is not None and is_adapter(path):  # else another process removed it in between
                    problems[path.name] = error
        return problems

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
                return self._publish(name, Path(source))
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=self.folder) as saved:
                return self._publish(name, source.save(Path(saved) / "adapter"))

    def remove(self, spec: str) -> list[int]:
        """Remove one version (`name@3`, `name@latest`), or all of a `name`; return their numbers, not to be used again.

        Files that are not the adapter's stay, such as those of a training run.

        Raises:
            UnknownAdapterError: no such adapter or version.
            AdapterError: the store cannot be changed.
        """
        name, number = self._resolve(spec)
        numbers = [number] if "@" in spec else self.versions(name)
        self._remove(name, numbers)
        return numbers

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

    def _publish(self, name: str, source: Path) -> Stored:
        from loradeck.lora.adapter import Adapter

        listing = read_folder(source)
        files = files_of(listing)
        digest = digest_of(source, files)
        Adapter.from_files(listing, check_copy=lambda *_: None)  # only a bank can compare copies with its base
        card = [CARD] if (source / CARD).is_file() else []
        tokenizer = TokenizerFiles.of(source, stamp(source))
        number, record = self._claim(name)
        try:
            with new_folder(self.path(name, number)) as new:
                for file in [*files, *card, *tokenizer.names]:
                    shutil.copyfile(source / file, new / file)
                if digest_of(new, files) != digest or TokenizerFiles.of(source, stamp(source)) != tokenizer:
                    raise AdapterError(f"{source} was changed while it was read", hint="Publish it again.")
        except BaseException:
            record.unlink(missing_ok=True)
            raise
        stored = self._stored(name, number)
        with suppress(OSError):  # the version is published; a record only saves time
            write_file(record, msgspec.json.encode(VersionRecord.of(digest, stored.stamp)))
        return replace(stored, recorded_sha256=digest)

    def _claim(self, name: str) -> tuple[int, Path]:
        """Claim the next number, with a file that only one process can create; the file outlives the version."""
        (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
        number = max([0, *self._versions(name), *self._recorded(name)])
        while True:
            number += 1
            record = self._record(name, number)
            with suppress(FileExistsError):
                record.touch(exist_ok=False)
                if not self.path(name, number).exists():
                    return number, record

    def _remove(self, name: str, numbers: list[int]) -> None:
        with self._changing():
            for number in numbers:  # oldest first, so that `latest` never goes back
                remove_adapter(self.path(name, number))
            # The highest record stays, because the next number follows it.
            for number in set(self._recorded(name)[:-1]) - {*self._versions(name)}:
                self._record(name, number).unlink(missing_ok=True)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AdapterError(f"the store {self.folder} cannot be changed: {error}") from error

    # ---- files

    def path(self, name: str, number: int) -> Path:
        """Return the folder of a version, whether it is there or not; number 0 is the unpublished folder."""
        return self.folder / (f"{name}@{number}" if number else name)

    def _record(self, name: str, number: int) -> Path:
        return self.folder / RECORDS / f"{name}@{number}.json"

    def _stored(self, name: str, number: int) -> Stored:
        return read_stored(name, number, self.path(name, number), self._record(name, number) if number else None)

    def _stored_now(self, spec: str, name: str, number: int) -> Stored:
        """Read a version that `spec` was resolved to, or resolve it again if the version was removed since."""
        try:
            return self._stored(name, number)
        except AdapterError:
            if is_adapter(self.path(name, number)):
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

    def _versions(self, name: str) -> list[int]:
        if why_not_served(name):
            return []
        while True:
            folders = (folder for folder in self._folders() if folder.partition("@")[0] == name)
            listed = {number: self.path(name, number) for other, number in map(split_spec, folders) if other == name}
            numbers = sorted(number for number, path in listed.items() if is_adapter(path))
            if all(os.path.lexists(path) for number, path in listed.items() if number not in numbers):
                return numbers
            # A version was removed since the folder was listed, and a newer one may have been published before that.

    def _recorded(self, name: str) -> list[int]:
        """Return the numbers claimed for this name; low ones whose versions were removed may be missing."""
        try:
            files = os.listdir(self.folder / RECORDS)  # noqa: PTH208
        except FileNotFoundError:
            return []
        specs = (file.removesuffix(".json") for file in files if file.startswith(f"{name}@"))
        return sorted(number for other, number in map(split_spec, specs) if other == name and number)

    def _catalogue(self) -> dict[str, list[int]]:
        """Return the version numbers of every adapter by name, including invalid names."""
        catalogue: dict[str, list[int]] = {}
        changed: set[str] = set()
        for folder in self._folders():
            path, (name, number) = self.folder / folder, split_spec(folder)
            if not folder.startswith(".") and is_adapter(path):
                catalogue.setdefault(name, []).append(number)
            elif not os.path.lexists(path):  # removed since the folder was listed; a newer version may be there
                changed.add(name)
        for name in changed:
            catalogue[name] = self._versions(name)
        return {name: numbers for name, numbers in catalogue.items() if numbers}

    def _folders(self) -> list[str]:
        try:
            return os.listdir(self.folder)  # noqa: PTH208  (Path.iterdir would make thousands of unneeded paths)
        except OSError as error:
            hint = "Name a folder of adapters."
            raise AdapterError(f"the store {self.folder} cannot be read: {error.strerror}", hint=hint) from error


def split_spec(spec: str) -> tuple[str, int]:
    """Return a folder's name and number; without a valid number all of it is the name, and "@" makes it invalid."""
    name, _, number = spec.partition("@")
    return (name, int(number)) if NUMBER.fullmatch(number) else (spec, 0)


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


def why_not_served(folder: str) -> AdapterNameError | None:
    """Return why requests cannot name the adapter of a folder of this name, with a name that would do."""
    name, _ = split_spec(folder)
    try:
        check_name(name)
    except AdapterNameError as error:
        return AdapterNameError(error.message, hint=f"Rename the folder, for example to {valid_name(name)!r}.")
    return None


def is_store(folder: Path) -> bool:
    """Return whether a folder is empty or holds adapters, and is none itself."""
    if not folder.is_dir() or is_adapter(folder):
        return False
    inside = [*folder.iterdir()]
    return not inside or any(path.name == RECORDS or is_adapter(path) for path in inside)


def adapter_files(folder: Path) -> list[Path]:
    """Return the files of an adapter that are there, in the order in which to remove them."""
    files = [folder / CONFIG, *sorted(folder.glob(TENSOR_FILES)), folder / CARD]
    if not (folder / MODEL).exists():  # else the tokenizer may be that of a model in the same folder
        files += [folder / name for name in sorted(tokenizer_files.NAMES)]
    return [file for file in files if file.is_symlink() or file.is_file()]


def remove_adapter(folder: Path) -> None:
    """Move the folder away in one rename; if it holds other files too, move only the adapter's, its config first."""
    with (
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside,
        suppress(FileNotFoundError),
    ):
        files = adapter_files(folder)
        if folder.is_symlink() or set(folder.iterdir()) <= set(files):
            folder.rename(Path(aside) / folder.name)
        else:
            for file in files:
                with suppress(FileNotFoundError):
                    file.rename(Path(aside) / file.name)
