"""Find the rows of a dataset: a file, a folder of splits, or the hub.

Every row is one line of JSON and its location, whatever kind of file it comes from.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import msgspec

from loradeck.base import is_hub_id
from loradeck.dataset import table
from loradeck.errors import DataError

LINE_BYTES = 4 << 20
DATASET_BYTES = 256 << 20  # its tokens are held in memory, at about ten times this size

Split: TypeAlias = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "eval": "valid",
    "test": "test",
}
# The stem of a split's file: train, or a shard as the hub names them, train-00000-of-00002, sometimes with a hash.
SHARD = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:-\d+-of-(\d+)(?:-[0-9a-f]+)?)?")
SUFFIXES = (".jsonl", ".ndjson", ".json", *table.SUFFIXES)
HINT = f"Give a file ({', '.join(SUFFIXES)}), a folder with train, valid and test of these, or owner/name of the hub."


@dataclass(frozen=True, slots=True)
class Row:
    """One record as JSON, or the error of reading it; and its location, `file:line`."""

    location: str
    content: bytes | DataError


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset's rows by split, read lazily; they can be iterated over again."""

    rows: Mapping[Split, Iterable[Row]]
    files: tuple[Path, ...]

    @property
    def sha256(self) -> str:
        """Of the bytes of the files, split after split; of the rows if there are no files."""
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
class _RowReader:
    """Reads the rows anew each time it is iterated over."""

    read: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def find(name: str | Path) -> Source:
    """Find a dataset and its splits, without reading its rows.

    Raises:
        DataError: it does not exist, has no train split, or is too large.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            if any((path / file).exists() for file in table.SAVED):
                return _from_tables(path.name, table.load_saved(path))
            return _from_files(_split_files(path))
        if path.exists():
            return _from_files({"train": [path]})
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint=HINT) from error
    hub_id, _, config = path.as_posix().partition(":")
    if path.suffix.lower() in SUFFIXES or not is_hub_id(hub_id):
        raise DataError(f"{path} cannot be read: no such file or folder", hint=HINT)
    return _from_tables(hub_id, table.load_from_hub(hub_id, config or None))


def _from_files(splits: Mapping[Split, list[Path]]) -> Source:
    files = [path for split in SPLITS for path in splits.get(split, ())]
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path} is none of {', '.join(SUFFIXES)}", hint=HINT)
    size = sum(path.stat().st_size for path in files)
    if size > DATASET_BYTES:
        where = files[0] if len(files) == 1 else files[0].parent
        raise DataError(f"{where} has {size:,} bytes, more than {DATASET_BYTES:,}", hint="Train on a part of it.")
    rows = {split: _RowReader(partial(_read_files, splits[split])) for split in SPLITS if split in splits}
    return Source(rows, tuple(files))


def _from_tables(name: str, tables: Mapping[str, table.RecordBatches]) -> Source:
    """Map the splits of the `datasets` library to ours; those with other names are ignored."""
    splits: dict[Split, list[str]] = {}
    for key in tables:
        if key in SPLIT_NAMES:
            splits.setdefault(SPLIT_NAMES[key], []).append(key)
    _check_splits(name, splits, tables)
    rows = {
        split: _RowReader(partial(_read_table, f"{name}/{key}", partial(table.numbered, tables[key])))
        for split in SPLITS
        for key in splits.get(split, ())
    }
    return Source(rows, ())


def _split_files(folder: Path) -> dict[Split, list[Path]]:
    """Find a folder's files by split, in the folder itself or, as in repositories of the hub, in its `data`."""
    files: list[Path] = []
    groups: dict[Split, dict[str, list[Path]]] = {}
    for parent in (folder, folder / "data"):
        if groups or not parent.is_dir():
            continue
        files = sorted(path for path in parent.iterdir() if path.suffix.lower() in SUFFIXES)
        for path in files:
            if shard := SHARD.fullmatch(path.stem):
                groups.setdefault(SPLIT_NAMES[shard[1]], {}).setdefault(shard[1] + path.suffix, []).append(path)
    _check_splits(str(folder), groups, [path.name for path in files])
    splits = {split: next(iter(group.values())) for split, group in groups.items()}
    for shards in splits.values():
        shard = SHARD.fullmatch(shards[0].stem)
        if shard and len(shards) != int(shard[2] or 1):
            raise DataError(
                f"{folder} has {len(shards)} of {shard[2] or 1} files like {shards[0].name}", hint="Copy all."
            )
    return splits


def _check_splits(name: str, splits: Mapping[Split, Iterable[str]], files: Iterable[str]) -> None:
    """Refuse a dataset without a train split, or with two candidates for a split."""
    for split, keys in splits.items():
        if len(candidates := list(keys)) > 1:
            raise DataError(f"{name}: {' and '.join(candidates)} could both be the {split} split", hint="Keep one.")
    if "train" not in splits:
        shown = ", ".join(list(files)[:5])
        raise DataError(
            f"{name} has no train split" + (f"; it has {shown}" if shown else " and no other data"), hint=HINT
        )


def _read_files(paths: Iterable[Path]) -> Iterator[Row]:
    return chain.from_iterable(map(_read_file, paths))


def _read_file(path: Path) -> Iterator[Row]:
    """Read one file.

    Raises:
        DataError: it cannot be read at all.
    """
    try:
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                yield from _read_lines(path)
            case ".json":
                yield from _read_json(path)
            case _:
                yield from _read_table(path.name, partial(table.read, path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint=HINT) from error


def _read_lines(path: Path) -> Iterator[Row]:
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


def _read_json(path: Path) -> Iterator[Row]:
    """Yield the objects of an array, or of the array under `data`; some .json files hold JSON lines."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    is_array = content.lstrip().startswith(b"[")
    try:
        document = msgspec.json.decode(content, type=list[msgspec.Raw] if is_array else _Wrapped)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if is_array:
            raise DataError(
                f"{path} is not valid JSON: {error}", hint="Correct it, or write one object a line, as .jsonl."
            ) from error
        yield from _read_lines(path)
        return
    offset, number = 0, 1
    for raw in document.data if isinstance(document, _Wrapped) else document:
        record = bytes(raw)
        start = content.index(record, offset)
        number += content.count(b"\n", offset, start)
        location = f"{path.name}:{number}"
        yield Row(location, record) if len(record) <= LINE_BYTES else _too_long(location)
        number += record.count(b"\n")
        offset = start + len(record)


def _read_table(name: str, read: Callable[[], table.NumberedRows]) -> Iterator[Row]:
    """Yield the records of a table as JSON, with their row numbers."""
    size = 0
    for number, record in read():
        location = f"{name}:{number}"
        if isinstance(record, DataError):
            yield Row(location, record)
            continue
        content = msgspec.json.encode(record)
        size += len(content)
        if size > DATASET_BYTES:  # a small file can decompress into a large one
            raise DataError(f"{name} has more than {DATASET_BYTES:,} bytes as JSON", hint="Train on a part of it.")
        yield Row(location, content) if len(content) <= LINE_BYTES else _too_long(location)


def _too_long(location: str) -> Row:
    return Row(location, DataError(f"$: has more than {LINE_BYTES:,} bytes; split it into several records"))
