"""Find the rows of a dataset: a file, a folder of splits, or the hub.

Every row is one line of JSON and its location, whatever kind of file it comes from.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import msgspec

from loradeck.dataset import delimited, json_file, table
from loradeck.dataset.text_file import open_utf8
from loradeck.errors import DataError
from loradeck.hub import is_hub_id

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
JSON = (".jsonl", ".ndjson", ".json")
TEXT = (*JSON, *delimited.SUFFIXES)
COMPRESSED = (".gz", ".zst")
PARQUET = ".parquet"
SUFFIXES = (*TEXT, *(text + suffix for text in TEXT for suffix in COMPRESSED), PARQUET)
FORMS = f"{', '.join(TEXT)} (or with {' or '.join(COMPRESSED)}), {PARQUET}"
HINT = f"Give a file ({FORMS}), a folder with train, valid and test of these, or owner/name of the hub."


@dataclass(frozen=True, slots=True)
class Row:
    """One record as JSON, or the error of reading it; and its location, `file:line`.

    Records on one line are `file:line`, `file:line[1]`, `file:line[2]` and so on.
    """

    location: str
    content: bytes | DataError


@dataclass(slots=True)
class Position:
    """How far the files of a dataset were read, in bytes."""

    total: int = 0
    """0 if it has no files."""
    done: int = 0
    file: Path | None = None
    """The current file."""
    start: int = 0
    """Where it begins."""
    size: int = 0
    """Of what was read of it, once that is decompressed."""
    on_read: Callable[["Position"], None] | None = None

    def begin(self, file: Path, start: int) -> None:
        """Go on with another file."""
        self.file, self.start, self.size = file, start, 0

    def move(self, done: int, size: int) -> None:
        """Set how far the current file was read, and tell `on_read`."""
        self.done, self.size = self.start + done, size
        if self.on_read:
            self.on_read(self)


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset's rows by split, read lazily; they can be iterated over again."""

    rows: Mapping[Split, Iterable[Row]]
    files: tuple[Path, ...]
    position: Position
    """Of the last iteration."""

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


def find(name: str | Path, encoding: str | None = None, on_read: Callable[[Position], None] | None = None) -> Source:
    """Find a dataset and its splits, without reading its rows; `encoding` is that of its text files, if it is named.

    `on_read` is called whenever a piece of a file was read; what it raises, the rows raise.

    Raises:
        DataError: it does not exist, or has no train split.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            if any((path / file).exists() for file in table.SAVED):
                return _from_tables(path.name, table.load_saved(path))
            return _from_files(_split_files(path), encoding, on_read)
        if path.exists():
            return _from_files({"train": [path]}, encoding, on_read)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint=HINT) from error
    # As it was given: a path may begin with ./. Within a folder that is here, a name that is not there was mistyped.
    hub_id, _, config = name.partition(":") if isinstance(name, str) else ("", "", "")
    if _suffix(path) in SUFFIXES or path.parent.exists() or not is_hub_id(hub_id):
        raise DataError(f"{path} cannot be read: no such file or folder", hint=HINT)
    return _from_tables(hub_id, table.load_from_hub(hub_id, config or None))


def _suffix(path: Path) -> str:
    """Return a file's suffix, in lower case and with that of its compression: .jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2 if suffixes[-1:] and suffixes[-1] in COMPRESSED else -1 :])


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(_suffix(path))]


def _from_files(
    splits: Mapping[Split, list[Path]], encoding: str | None, on_read: Callable[[Position], None] | None
) -> Source:
    files = [path for split in SPLITS for path in splits.get(split, ())]
    for path in files:
        if _suffix(path) not in SUFFIXES:
            raise DataError(f"{path} is none of {FORMS}", hint=HINT)
    ends = [*accumulate((path.stat().st_size for path in files), initial=0)]
    starts, position = dict(zip(files, ends, strict=False)), Position(ends[-1], on_read=on_read)

    def read(paths: Sequence[Path]) -> Iterator[Row]:
        for path in paths:
            position.begin(path, starts[path])
            yield from _read_file(path, encoding, position)

    rows = {split: _RowReader(partial(read, splits[split])) for split in SPLITS if split in splits}
    return Source(rows, tuple(files), position)


def _from_tables(name: str, tables: Mapping[str, table.RecordBatches]) -> Source:
    """Map the splits of the `datasets` library to ours; those with other names are ignored."""
    splits: dict[Split, list[str]] = {}
    for key in tables:
        if key in SPLIT_NAMES:
            splits.setdefault(SPLIT_NAMES[key], []).append(key)
    _check_splits(name, splits, tables)
    rows = {
        split: _RowReader(lambda key=key: _read_table(f"{name}/{key}", table.numbered(tables[key])))
        for split in SPLITS
        for key in splits.get(split, ())
    }
    return Source(rows, (), Position())


def _split_files(folder: Path) -> dict[Split, list[Path]]:
    """Find a folder's files by split, in the folder itself or, as in repositories of the hub, in its `data`."""
    files: list[Path] = []
    groups: dict[Split, dict[str, list[Path]]] = {}
    for parent in (folder, folder / "data"):
        if groups or not parent.is_dir():
            continue
        files = sorted(path for path in parent.iterdir() if _suffix(path) in SUFFIXES)
        for path in files:
            if shard := SHARD.fullmatch(_stem(path)):
                groups.setdefault(SPLIT_NAMES[shard[1]], {}).setdefault(shard[1] + _suffix(path), []).append(path)
    _check_splits(str(folder), groups, [path.name for path in files])
    splits = {split: next(iter(group.values())) for split, group in groups.items()}
    for shards in splits.values():
        shard = SHARD.fullmatch(_stem(shards[0]))
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


def _read_file(path: Path, encoding: str | None, position: Position) -> Iterator[Row]:
    """Read one file.

    Raises:
        DataError: it cannot be read, or not from some line on.
    """
    suffix = _suffix(path)
    try:
        if suffix == PARQUET:
            yield from _read_table(path.name, table.numbered(table.parquet(path, lambda size: position.move(0, size))))
        else:
            with open_utf8(path, encoding, position.move) as file:
                if suffix.startswith(JSON):
                    line = index = 0
                    for number, content in json_file.read(file, str(path)):
                        index = index + 1 if number == line else 0  # of the record within its line
                        line = number
                        yield Row(f"{path.name}:{line}" + (f"[{index}]" if index else ""), content)
                else:
                    yield from _read_table(path.name, delimited.read(file, str(path)))
        position.move(path.stat().st_size, position.size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint=HINT) from error


def _read_table(name: str, rows: table.NumberedRows) -> Iterator[Row]:
    """Yield the records of a table as JSON, with their row numbers."""
    for number, record in rows:
        content = record if isinstance(record, DataError) else msgspec.json.encode(record)
        too_long = isinstance(content, bytes) and len(content) > json_file.RECORD_BYTES
        yield Row(f"{name}:{number}", json_file.too_long() if too_long else content)
