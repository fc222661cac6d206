"""Where the records of a dataset lie: a file, a folder of splits, or the hub. Knows files; knows no record's form.

Every row comes out as one line of JSON with the place it came from, whatever wrote it.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import huggingface_hub.utils as hub
import msgspec

from loradeck.dataset import table
from loradeck.errors import DataError

LINE_BYTES = 4 << 20
DATASET_BYTES = 256 << 20  # its tokens are held in memory, at about ten times this size

Split: TypeAlias = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
NAMES: dict[str, Split] = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "eval": "valid",
    "test": "test",
}
# A split's file: train.jsonl, or as the hub writes shards, train-00000-of-00002.parquet, sometimes with a hash.
FILE = re.compile(rf"({'|'.join(NAMES)})(?:-\d+-of-(\d+)(?:-[0-9a-f]+)?)?")
KINDS = (".jsonl", ".ndjson", ".json", *table.KINDS)
GIVE = f"Give a file ({', '.join(KINDS)}), a folder with train, valid and test of these, or owner/name of the hub."


@dataclass(frozen=True, slots=True)
class Row:
    """One record as JSON, or why it is none; and where it is from, `file:line`."""

    place: str
    content: bytes | DataError


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset's rows by split, read as they are asked for."""

    rows: Mapping[Split, Iterable[Row]]
    files: tuple[Path, ...]

    @property
    def sha256(self) -> str:
        """Of the bytes of the files, split after split; of the rows where the files are the hub's."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        if not self.files:
            for row in chain.from_iterable(self.rows.values()):
                digest.update(row.content if isinstance(row.content, bytes) else b"")
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that can be read again."""

    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def find(name: str | Path) -> Source:
    """Find a dataset and its splits; nothing is read yet.

    Raises:
        DataError: nothing is there, it has no train split, or it is too large.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            if any((path / saved).exists() for saved in table.SAVED):
                return _of_tables(path.name, table.saved(path))
            return _of_files(_splits(path))
        if path.exists():
            return _of_files({"train": [path]})
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint=GIVE) from error
    hub_id, _, config = path.as_posix().partition(":")
    if path.suffix.lower() in KINDS or "/" not in hub_id or not _is_hub_id(hub_id):
        raise DataError(f"{path} cannot be read: no such file or folder", hint=GIVE)
    return _of_tables(hub_id, table.downloaded(hub_id, config or None))


def _of_files(splits: Mapping[Split, list[Path]]) -> Source:
    files = [path for split in SPLITS for path in splits.get(split, ())]
    for path in files:
        if path.suffix.lower() not in KINDS:
            raise DataError(f"{path} is none of {', '.join(KINDS)}", hint=GIVE)
    size = sum(path.stat().st_size for path in files)
    if size > DATASET_BYTES:
        where = files[0] if len(files) == 1 else files[0].parent
        raise DataError(f"{where} has {size:,} bytes, more than {DATASET_BYTES:,}", hint="Train on a part of it.")
    rows = {split: _Rows(partial(_all_of, splits[split])) for split in SPLITS if split in splits}
    return Source(rows, tuple(files))


def _of_tables(name: str, tables: Mapping[str, table.Batches]) -> Source:
    """Sort the splits of the `datasets` library by our names; those of other names are passed over."""
    splits: dict[Split, list[str]] = {}
    for key in tables:
        if key in NAMES:
            splits.setdefault(NAMES[key], []).append(key)
    _one_each(name, splits, tables)
    rows = {
        split: _Rows(partial(_numbered, f"{name}/{key}", partial(table.records, tables[key])))
        for split in SPLITS
        for key in splits.get(split, ())
    }
    return Source(rows, ())


def _splits(folder: Path) -> dict[Split, list[Path]]:
    """Find a folder's files by split, in itself or in its `data`, as repositories of the hub have it."""
    there: list[Path] = []
    found: dict[Split, dict[str, list[Path]]] = {}
    for place in (folder, folder / "data"):
        if found or not place.is_dir():
            continue
        there = sorted(path for path in place.iterdir() if path.suffix.lower() in KINDS)
        for path in there:
            if named := FILE.fullmatch(path.stem):
                found.setdefault(NAMES[named[1]], {}).setdefault(named[1] + path.suffix, []).append(path)
    _one_each(str(folder), found, [path.name for path in there])
    splits = {split: next(iter(files.values())) for split, files in found.items()}
    for files in splits.values():
        shards = FILE.fullmatch(files[0].stem)
        if shards and len(files) != int(shards[2] or 1):
            raise DataError(
                f"{folder} has {len(files)} of {shards[2] or 1} files like {files[0].name}", hint="Copy all."
            )
    return splits


def _one_each(name: str, found: Mapping[Split, Iterable[str]], there: Iterable[str]) -> None:
    """Refuse a dataset without a train split, or with two that could be it."""
    for split, keys in found.items():
        if len(several := list(keys)) > 1:
            raise DataError(f"{name}: {' and '.join(several)} could both be the {split} split", hint="Keep one.")
    if "train" not in found:
        shown = ", ".join(list(there)[:5]) or "nothing that could be one"
        raise DataError(f"{name} has no train split; it has {shown}", hint=GIVE)


def _all_of(paths: Iterable[Path]) -> Iterator[Row]:
    return chain.from_iterable(map(_rows, paths))


def _rows(path: Path) -> Iterator[Row]:
    """Read one file.

    Raises:
        DataError: it cannot be read at all.
    """
    try:
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                yield from _lines(path)
            case ".json":
                yield from _document(path)
            case _:
                yield from _numbered(path.name, partial(table.read, path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint=GIVE) from error


def _lines(path: Path) -> Iterator[Row]:
    """Yield the lines that are not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
            if len(line) > LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LINE_BYTES)
                yield _too_long(f"{path.name}:{number}")
            elif line.strip():
                yield Row(f"{path.name}:{number}", line)


class _Wrapped(msgspec.Struct, frozen=True):
    data: list[msgspec.Raw]


def _document(path: Path) -> Iterator[Row]:
    """Yield the objects of an array, or of the array under `data`; some files of this name have JSON lines."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    array = content.lstrip().startswith(b"[")
    try:
        kind = list[msgspec.Raw] if array else _Wrapped
        found = msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if array:
            raise DataError(
                f"{path} is no JSON: {error}", hint="Correct it, or write one object a line, as .jsonl."
            ) from error
        yield from _lines(path)
        return
    at, number = 0, 1
    for raw in found.data if isinstance(found, _Wrapped) else found:
        record = bytes(raw)
        start = content.index(record, at)
        number += content.count(b"\n", at, start)
        place = f"{path.name}:{number}"
        yield Row(place, record) if len(record) <= LINE_BYTES else _too_long(place)
        number += record.count(b"\n")
        at = start + len(record)


def _numbered(name: str, read: Callable[[], table.Numbered]) -> Iterator[Row]:
    """Yield the records of a table as JSON, with the numbers of their rows."""
    size = 0
    for number, record in read():
        place = f"{name}:{number}"
        if isinstance(record, DataError):
            yield Row(place, record)
            continue
        content = msgspec.json.encode(record)
        size += len(content)
        if size > DATASET_BYTES:  # a small file can unfold into a large one
            raise DataError(f"{name} has more than {DATASET_BYTES:,} bytes as JSON", hint="Train on a part of it.")
        yield Row(place, content) if len(content) <= LINE_BYTES else _too_long(place)


def _too_long(place: str) -> Row:
    return Row(place, DataError(f"$: has more than {LINE_BYTES:,} bytes; make several records of it"))


def _is_hub_id(name: str) -> bool:
    try:
        hub.validate_repo_id(name)
    except hub.HFValidationError:
        return False
    return True
