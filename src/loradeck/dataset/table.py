"""Datasets in rows and columns: CSV, Parquet, and those of the `datasets` library.

CSV needs no package. The rest needs `datasets`, which brings pyarrow; it is imported only here, and only when used.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from loradeck.errors import DataError

SUFFIXES = (".csv", ".tsv", ".parquet")
SAVED = ("dataset_dict.json", "state.json")  # files that save_to_disk writes
# A CSV cell is text; in these columns it is JSON.
JSON_COLUMNS = ("messages", "conversations", "tools", "history", "tokens", "input_ids", "labels", "attention_mask")
BATCH_ROWS = 1000  # rows of a table in memory at a time
EXTRA = "Run pip install 'loradeck[datasets]'."

RecordBatches: TypeAlias = Callable[[], Iterator[list[dict[str, Any]]]]
NumberedRows: TypeAlias = Iterator[tuple[int, dict[str, Any] | DataError]]


def read(path: Path) -> NumberedRows:
    """Yield the rows of a file with their numbers; in CSV the header is row 1, as in a spreadsheet.

    Raises:
        OSError: the file cannot be read.
        DataError: it is not such a table.
    """
    return numbered(_parquet(path)) if path.suffix.lower() == ".parquet" else _csv(path)


def numbered(batches: RecordBatches) -> NumberedRows:
    """Yield the rows of a table, numbered from 1."""
    number = 0
    for batch in batches():
        for row in batch:
            number += 1
            yield number, _without_nulls(row)


def load_saved(folder: Path) -> dict[str, RecordBatches]:
    """Open a folder that `save_to_disk` wrote, by split; a dataset without splits is `train`.

    Raises:
        DataError: it cannot be opened, or `datasets` is not installed.
    """
    datasets = _import("datasets", folder)
    return _load(folder, lambda: datasets.load_from_disk(str(folder)))


def load_from_hub(hub_id: str, config: str | None) -> dict[str, RecordBatches]:
    """Load a dataset of the hub, by split. No remote code runs: `datasets` no longer supports it.

    Raises:
        DataError: the hub has no such dataset or cannot be reached, or `datasets` is not installed.
    """
    datasets = _import("datasets", hub_id)
    return _load(
        f"{hub_id} is no file or folder here, and as a dataset of the hub it",
        lambda: datasets.load_dataset(hub_id, config),
    )


def _load(name: str | Path, load: Callable[[], Any]) -> dict[str, RecordBatches]:
    try:
        dataset = load()
    except Exception as error:  # strangers' files and responses can make it raise anything
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{name} cannot be loaded: {reason}",
            hint="Give a dataset with several configurations as owner/name:configuration.",
        ) from error
    splits = dataset if isinstance(dataset, Mapping) else {"train": dataset}
    return {str(key): _arrow(split) for key, split in splits.items()}


def _arrow(dataset: Any) -> RecordBatches:
    """Read rows as Arrow stores them: images and audio are not decoded."""
    return lambda: (batch.to_pylist() for batch in dataset.with_format("arrow").iter(BATCH_ROWS))


def _parquet(path: Path) -> RecordBatches:
    parquet = _import("pyarrow.parquet", path)

    def batches() -> Iterator[list[dict[str, Any]]]:
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH_ROWS):
                    yield batch.to_pylist()
        except ValueError as error:  # the base class of pyarrow's own errors
            raise DataError(f"{path} is not a Parquet file: {error}", hint="Copy it again.") from error

    return batches


def _csv(path: Path) -> NumberedRows:
    """Read a table of text; the first row names the columns."""
    csv.field_size_limit(1 << 30)  # source.py limits the size of a record instead
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
                yield number, _record(columns, row)


def _record(columns: list[str], row: list[str]) -> dict[str, Any] | DataError:
    if len(row) != len(columns):
        return DataError(f"$: has {len(row)} cells for {len(columns)} columns; quote cells that contain delimiters")
    record: dict[str, Any] = dict(zip(columns, row, strict=True))
    for column in JSON_COLUMNS:
        try:
            if (cell := record.get(column, "").strip()).startswith("["):
                record[column] = msgspec.json.decode(cell)
        except (msgspec.DecodeError, RecursionError) as error:
            return DataError(f"$.{column}: invalid JSON: {error}")
    return record


def _without_nulls(value: Any) -> Any:
    """Remove null keys: Arrow gives every row the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _import(module: str, source: object) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(f"{source} needs the package datasets", hint=EXTRA) from error
