"""The catalogue of adapters on disk, by name and version. Knows PEFT folders; knows no model and no bank.

A version is the folder `name@number`, and the highest number is the latest: the rename that makes a version visible
moves `latest` in the same step. A folder without a number is version 0, the one that was not published. Every question
is answered from the disk, so what other processes do is seen at once. Needs no torch but to publish.
"""

import difflib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loradeck.disk import new_folder, write_file
from loradeck.errors import AdapterError, AdapterNameError, ConfigError, LoradeckError, UnknownAdapterError
from loradeck.lora.manifest import read_folder
from loradeck.lora.names import check_name
from loradeck.lora.peft import CARD, CONFIG
from loradeck.stored import Record, Stored, digest_of, files_of, is_adapter, read_stored

if TYPE_CHECKING:
    from loradeck.lora.adapter import Adapter

RECORDS = ".versions"  # for each number given a file: it claims the number, and keeps the sha256
LATEST = "latest"
NUMBER = re.compile("[1-9][0-9]{0,17}")


class AdapterStore:
    """A folder of adapters. Any number of threads and processes may read and change it at the same time."""

    def __init__(self, folder: str | Path) -> None:
        """Open a store; its folder need not be there before the first `publish`."""
        self.folder = Path(folder).absolute()

    # ---- what is here

    def names(self) -> list[str]:
        """Return the names of all adapters, sorted; those that cannot be used too, see `problems`.

        Raises:
            AdapterError: the store's folder cannot be read.
        """
        return sorted(name for name in self._catalogue() if _possible(name))

    def versions(self, name: str) -> list[int]:
        """Return the numbers of an adapter's versions, the latest last.

        Raises:
            UnknownAdapterError: there is no such adapter; close names are listed.
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
        """Return the version that `name`, `name@latest` or `name@number` means now.

        Raises:
            UnknownAdapterError: there is none; close names, or the versions there are, are listed.
            AdapterError: it cannot be used; with every problem found in its headers.
        """
        name, number = self._resolve(spec)
        try:
            return self._stored(name, number)
        except AdapterError:
            if is_adapter(self._path(name, number)):
                raise
        return self.find(spec)  # it was removed in between

    def latest(self) -> list[Stored]:
        """Return the latest version of every adapter, sorted by name, but for those that cannot be used.

        Raises:
            AdapterError: the store's folder cannot be read.
        """
        found = []
        for name, numbers in sorted(self._catalogue().items()):
            if _possible(name):
                with suppress(AdapterError):
                    found.append(self._stored(name, max(numbers)))
        return found

    def problems(self) -> dict[str, LoradeckError]:
        """Return what cannot be used, by the name of its folder, with the reason.

        Raises:
            AdapterError: the store's folder cannot be read.
        """
        found: dict[str, LoradeckError] = {}
        for name, numbers in self._catalogue().items():
            for path, number in ((self._path(name, number), number) for number in numbers):
                try:
                    check_name(name)
                    self._stored(name, number)
                except (AdapterError, AdapterNameError) as error:
                    if is_adapter(path):  # else it was removed in between
                        found[path.name] = error
        return found

    # ---- changes

    def publish(self, name: str, source: "Adapter | Path | str") -> Stored:
        """Make an adapter, or a copy of a PEFT folder, the latest version of this name, in one step.

        It is read whole first. Only what makes a folder an adapter is copied: its configuration, tensors and card.

        Raises:
            AdapterNameError: the name cannot be one.
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

    def remove(self, spec: str) -> None:
        """Remove one version (`name@3`, `name@latest`), or all of a `name`; their numbers are not given again.

        Files that are no adapter's stay, such as those of a training run.

        Raises:
            UnknownAdapterError: there is none.
            AdapterError: the store cannot be changed.
        """
        name, number = self._resolve(spec)
        self._remove(name, [number] if "@" in spec else self.versions(name))

    def prune(self, name: str, *, keep: int) -> list[int]:
        """Remove all but the `keep` latest published versions, and return the numbers of those removed.

        Raises:
            ConfigError: `keep` is below 1.
            UnknownAdapterError: there is no such adapter.
            AdapterError: the store cannot be changed.
        """
        if keep < 1:
            raise ConfigError(f"keep={keep} would keep no version of {name!r}", hint="Keep 1, or call `remove`.")
        old = [number for number in self.versions(name) if number][:-keep]
        self._remove(name, old)
        return old

    def _publish(self, name: str, source: Path) -> Stored:
        from loradeck.lora.adapter import Adapter

        listing = read_folder(source)
        files = files_of(listing)
        digest = digest_of(source, files)
        Adapter.from_files(listing, check_copy=lambda *_: None)  # only a bank has the base to hold copies against
        card = [CARD] if (source / CARD).is_file() else []
        number, record = self._claim(name)
        try:
            with new_folder(self._path(name, number)) as fresh:
                for file in files + card:
                    shutil.copyfile(source / file, fresh / file)
                if digest_of(fresh, files) != digest:
                    raise AdapterError(f"{source} was changed while it was read", hint="Publish it again.")
        except BaseException:
            record.unlink(missing_ok=True)
            raise
        made = self._stored(name, number)
        with suppress(OSError):  # it is published; a record only saves time
            write_file(record, msgspec.json.encode(Record.of(digest, made.stamp)))
        return replace(made, recorded=digest)

    def _claim(self, name: str) -> tuple[int, Path]:
        """Take the next number, by a file that only one process can create; it outlives the version."""
        (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
        number = max([0, *self._versions(name), *self._recorded(name)])
        while True:
            number += 1
            record = self._record(name, number)
            with suppress(FileExistsError):
                record.touch(exist_ok=False)
                if not self._path(name, number).exists():
                    return number, record

    def _remove(self, name: str, numbers: list[int]) -> None:
        with self._changing():
            for number in numbers:  # the oldest first, so that `latest` does not go back on the way
                _remove_adapter(self._path(name, number))
            for number in set(self._recorded(name)[:-1]) - {*self._versions(name)}:  # the last says where to go on
                self._record(name, number).unlink(missing_ok=True)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AdapterError(f"the store {self.folder} cannot be changed: {error}") from error

    # ---- what lies where

    def _path(self, name: str, number: int) -> Path:
        return self.folder / (f"{name}@{number}" if number else name)

    def _record(self, name: str, number: int) -> Path:
        return self.folder / RECORDS / f"{name}@{number}.json"

    def _stored(self, name: str, number: int) -> Stored:
        return read_stored(name, number, self._path(name, number), self._record(name, number) if number else None)

    def _resolve(self, spec: str) -> tuple[str, int]:
        name, at, which = spec.partition("@")
        numbers = self.versions(name)
        if not at or which == LATEST:
            return name, numbers[-1]
        if (which == "0" or NUMBER.fullmatch(which)) and int(which) in numbers:
            return name, int(which)
        there = ", ".join(map(str, numbers[-8:]))
        raise UnknownAdapterError(f"{name!r} has no version {which[:20]!r}", hint=f"The latest are: {there}.")

    def _versions(self, name: str) -> list[int]:
        own = [entry for entry in self._entries() if entry.partition("@")[0] == name] if _possible(name) else []
        numbers = (number for known, number in map(_split, own) if known == name)
        return sorted(number for number in numbers if is_adapter(self._path(name, number)))

    def _recorded(self, name: str) -> list[int]:
        """Return the numbers given to this name, but for low ones whose versions were removed."""
        try:
            entries = os.listdir(self.folder / RECORDS)  # noqa: PTH208
        except FileNotFoundError:
            return []
        own = [entry.removesuffix(".json") for entry in entries if entry.startswith(f"{name}@")]
        return sorted(number for known, number in map(_split, own) if known == name and number)

    def _catalogue(self) -> dict[str, list[int]]:
        """Return the versions of every adapter, under impossible names too."""
        found: dict[str, list[int]] = {}
        for entry in self._entries():
            if not entry.startswith(".") and is_adapter(self.folder / entry):
                name, number = _split(entry)
                found.setdefault(name, []).append(number)
        return found

    def _entries(self) -> list[str]:
        try:
            return os.listdir(self.folder)  # noqa: PTH208  (Path.iterdir makes thousands of paths, most for nothing)
        except OSError as error:
            hint = "Name a folder of adapters."
            raise AdapterError(f"the store {self.folder} cannot be read: {error.strerror}", hint=hint) from error


def _split(entry: str) -> tuple[str, int]:
    """Return name and number of a folder; what is no version is all name, and a name with "@" is impossible."""
    name, _, number = entry.partition("@")
    return (name, int(number)) if NUMBER.fullmatch(number) else (entry, 0)


def _possible(name: str) -> bool:
    try:
        check_name(name)
    except AdapterNameError:
        return False
    return True


def _remove_adapter(folder: Path) -> None:
    """Set the folder aside in one rename; where others have files in it too, the adapter's only, its config first."""
    with (
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside,
        suppress(FileNotFoundError),
    ):
        own = [folder / CONFIG, *sorted(folder.glob("adapter_model*.safetensors*")), folder / CARD]
        if folder.is_symlink() or set(folder.iterdir()) <= set(own):
            folder.rename(Path(aside) / folder.name)
        else:
            for file in own:
                with suppress(FileNotFoundError):
                    file.rename(Path(aside) / file.name)
