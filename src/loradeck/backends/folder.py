"""Versions in a folder of PEFT folders: `name@number`, and `name` for what was never published.

A version is made visible by the rename of its folder. A file for each number claims it, and records the sha256.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from loradeck import tokenizer_files
from loradeck.backends.original import Original
from loradeck.disk import new_folder, write_file
from loradeck.errors import AdapterError, AdapterNameError, LoradeckError
from loradeck.lora.folder import CARD, CONFIG
from loradeck.lora.manifest import TENSOR_FILES, is_adapter
from loradeck.lora.names import check_name, valid_name
from loradeck.stored import Stored, VersionRecord, read_stored

RECORDS = ".versions"  # a file for each number: it claims the number, and records the sha256
MODEL = "config.json"  # of transformers
NUMBER = re.compile("[1-9][0-9]{0,17}")


class FolderBackend:
    """A folder of adapters."""

    def __init__(self, folder: str | Path) -> None:
        """The first `publish` creates the folder."""
        self.folder = Path(folder).absolute()
        self.location = str(self.folder)

    # ---- queries

    def catalogue(self) -> dict[str, list[int]]:
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
            catalogue[name] = self.versions(name)
        return {name: numbers for name, numbers in catalogue.items() if numbers}

    def versions(self, name: str) -> list[int]:
        """Return the numbers of an adapter's versions, sorted; [] if there is none."""
        if why_not_served(name):
            return []
        while True:
            folders = (folder for folder in self._folders() if folder.partition("@")[0] == name)
            listed = {number: self.path(name, number) for other, number in map(split_spec, folders) if other == name}
            numbers = sorted(number for number, path in listed.items() if is_adapter(path))
            if all(os.path.lexists(path) for number, path in listed.items() if number not in numbers):
                return numbers
            # A version was removed since the folder was listed, and a newer one may have been published before that.

    def has(self, name: str, number: int) -> bool:
        """Return whether a version is there, usable or not."""
        return is_adapter(self.path(name, number))

    def read(self, name: str, number: int) -> Stored:
        """Read a version's headers.

        Raises:
            AdapterError: it is unusable, or was removed.
        """
        return read_stored(name, number, self.path(name, number), self._record(name, number) if number else None)

    def listed(self, specs: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Stored | LoradeckError]:
        """Return versions, or why they are unusable."""
        versions: dict[tuple[str, int], Stored | LoradeckError] = {}
        for name, number in specs:
            try:
                versions[name, number] = self.read(name, number)
            except AdapterError as error:
                versions[name, number] = error
        return versions

    def path(self, name: str, number: int) -> Path:
        """Return the folder of a version, whether it is there or not; number 0 is the unpublished folder."""
        return self.folder / (f"{name}@{number}" if number else name)

    # ---- changes

    def publish(self, name: str, source: Path) -> Stored:
        """Copy a PEFT folder, which is read completely first, and let it appear by a rename.

        Raises:
            AdapterError, UnsupportedError: it cannot be loaded.
            OSError: the folder cannot be changed.
        """
        original = Original.read(source)
        number, record = self._claim(name)
        try:
            with new_folder(self.path(name, number)) as new:
                original.copy_to(new)
        except BaseException:
            record.unlink(missing_ok=True)
            raise
        stored = self.read(name, number)
        with suppress(OSError):  # the version is published; a record only saves time
            write_file(record, msgspec.json.encode(VersionRecord.of(original.sha256, stored.stamp)))
        return replace(stored, recorded_sha256=original.sha256)

    def remove(self, name: str, numbers: Sequence[int]) -> None:
        """Remove versions, each by a rename.

        Raises:
            OSError: the folder cannot be changed.
        """
        for number in numbers:
            remove_adapter(self.path(name, number))
        # The highest record stays, because the next number follows it.
        for number in set(self._recorded(name)[:-1]) - {*self.versions(name)}:
            self._record(name, number).unlink(missing_ok=True)

    # ---- files

    def _claim(self, name: str) -> tuple[int, Path]:
        """Claim the next number, with a file that only one process can create; the file outlives the version."""
        (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
        number = max([0, *self.versions(name), *self._recorded(name)])
        while True:
            number += 1
            record = self._record(name, number)
            with suppress(FileExistsError):
                record.touch(exist_ok=False)
                if not self.path(name, number).exists():
                    return number, record

    def _record(self, name: str, number: int) -> Path:
        return self.folder / RECORDS / f"{name}@{number}.json"

    def _recorded(self, name: str) -> list[int]:
        """Return the numbers claimed for this name; low ones whose versions were removed may be missing."""
        try:
            files = os.listdir(self.folder / RECORDS)  # noqa: PTH208
        except FileNotFoundError:
            return []
        specs = (file.removesuffix(".json") for file in files if file.startswith(f"{name}@"))
        return sorted(number for other, number in map(split_spec, specs) if other == name and number)

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


def why_not_served(folder: str) -> AdapterNameError | None:
    """Return why requests cannot name the adapter of a folder of this name, with a name that would do."""
    name, _ = split_spec(folder)
    try:
        check_name(name)
    except AdapterNameError as error:
        return AdapterNameError(error.message, hint=f"Rename the folder, for example to {valid_name(name)!r}.")
    return None


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
