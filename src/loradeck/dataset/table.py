"""Datasets in rows and columns: CSV, Parquet, and what the `datasets` library holds. Knows cells; knows no record.

CSV needs nothing; the rest needs `datasets`, which brings pyarrow, and is imported only here and only when used.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from loradeck.errors import DataError

KINDS = (".csv", ".tsv", ".parquet")
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder
# A cell of CSV is text; in these columns it is JSON.
LISTS = ("messages", "conversations", "tools", "history", "tokens", "input_ids", "labels", "attention_mask")
ROWS = 1000  # of a table that are in memory at a time
EXTRA = "Run pip install 'loradeck[datasets]'."

Batches: TypeAlias = Callable[[], Iterator[list[dict[str, Any]]]]
Numbered: TypeAlias = Iterator[tuple[int, dict[str, Any] | DataError]]


def read(path: Path) -> Numbered:
    """Yield the rows of a file with their numbers; in CSV the header is row 1, as in a spreadsheet.

    Raises:
        OSError: it cannot be read.
        DataError: it is no such table.
    """
    return records(_parquet(path)) if path.suffix.lower() == ".parquet" else _csv(path)


def records(batches: Batches) -> Numbered:
    """Number the rows of a table from 1."""
    number = 0
    for batch in batches():
        for row in batch:
            number += 1
            yield number, _without_nulls(row)


def saved(folder: Path) -> dict[str, Batches]:
    """Open what `save_to_disk` wrote, by split; a dataset without splits is `train`.

    Raises:
        DataError: it cannot be opened, or `datasets` is not installed.
    """
    datasets = _library("datasets", folder)
    return _opened(folder, lambda: datasets.load_from_disk(str(folder)))


def downloaded(hub_id: str, config: str | None) -> dict[str, Batches]:
    """Load a dataset of the hub, by split. No code of its own is run: `datasets` no longer can.

    Raises:
        DataError: the hub has no such dataset or cannot be reached, or `datasets` is not installed.
    """
    datasets = _library("datasets", hub_id)
    return _opened(
        f"{hub_id} is no file or folder here, and as a dataset of the hub it",
        lambda: datasets.load_dataset(hub_id, config),
    )


def _opened(name: str | Path, load: Callable[[], Any]) -> dict[str, Batches]:
    try:
        found = load()
    except Exception as error:  # files and answers of strangers: what they can make it raise has no common class
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{name} cannot be loaded: {reason}",
            hint="A dataset of several configurations is given as owner/name:configuration.",
        ) from error
    splits = found if isinstance(found, Mapping) else {"train": found}
    return {str(key): _arrow(each) for key, each in splits.items()}


def _arrow(dataset: Any) -> Batches:
    """Read rows as Arrow holds them: images and sounds are not decoded."""
    return lambda: (batch.to_pylist() for batch in dataset.with_format("arrow").iter(ROWS))


def _parquet(path: Path) -> Batches:
    parquet = _library("pyarrow.parquet", path)

    def batches() -> Iterator[list[dict[str, Any]]]:
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(ROWS):
                    yield batch.to_pylist()
        except ValueError as error:  # pyarrow's own errors are of this class
            raise DataError(f"{path} is no Parquet file: {error}", hint="Copy it again.") from error

    return batches


def _csv(path: Path) -> Numbered:
    """Read a table of text; the first row names the columns."""
    csv.field_size_limit(1 << 30)  # the limit is on rows, and stands elsewhere
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        number = 0
        columns: list[str] = []
        while True:
            number += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                yield number, DataError(f"$: the file cannot be read from here on: {error}")
                return
            if not columns:
                columns = row
                if len(set(columns)) != len(columns):
                    raise DataError(f"{path} has two columns of one name", hint="Rename or remove one.")
            elif row:
                yield number, _cells(columns, row)


def _cells(columns: list[str], row: list[str]) -> dict[str, Any] | DataError:
    if len(row) != len(columns):
        return DataError(f"$: has {len(row)} cells for {len(columns)} columns; put quotes around cells with delimiters")
    record: dict[str, Any] = dict(zip(columns, row, strict=True))
    for column in LISTS:
        try:
            if (cell := record.get(column, "").strip()).startswith("["):
                record[column] = msgspec.json.decode(cell)
        except (msgspec.DecodeError, RecursionError) as error:
            return DataError(f"$.{column}: is not the JSON it should be: {error}")
    return record


def _without_nulls(value: Any) -> Any:
    """Take out keys that are null: Arrow gives every row the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(own) for key, own in value.items() if own is not None}
    return [_without_nulls(own) for own in value] if isinstance(value, list) else value


def _library(name: str, source: object) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f"{source} needs the package datasets", hint=EXTRA) from error
