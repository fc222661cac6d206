"""Tables of Arrow: Parquet files, and datasets of the `datasets` library.

They need `datasets`, which brings pyarrow; it is imported only here, and only when used.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from loradeck.errors import DataError

SAVED = ("dataset_dict.json", "state.json")  # files that save_to_disk writes
BATCH_ROWS = 100  # rows of a table in memory at a time
BUFFER = 1 << 20  # bytes of a column that are read at a time
HUB_SECONDS = 5.0
EXTRA = "Run pip install 'loradeck[datasets]'."

RecordBatches: TypeAlias = Callable[[], Iterator[list[dict[str, Any]]]]
NumberedRows: TypeAlias = Iterator[tuple[int, dict[str, Any] | DataError]]


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
    name = f"no such file or folder: {hub_id}; as a dataset of the hub it"
    datasets = _import("datasets", name)
    _require_hub(name, hub_id)
    return _load(name, lambda: datasets.load_dataset(hub_id, config))


def _require_hub(name: str, hub_id: str) -> None:
    """Ask the hub for a dataset: without a network, `datasets` would go on asking for a minute.

    Raises:
        DataError: the hub does not answer.
    """
    hub = import_module("huggingface_hub")
    try:
        hub.HfApi().dataset_info(hub_id, timeout=HUB_SECONDS)
    except (hub.errors.HfHubHTTPError, hub.errors.OfflineModeIsEnabled):
        return  # `datasets` says what is wrong, or has a copy
    except Exception as error:  # of the HTTP library, whichever huggingface_hub uses
        raise DataError(
            f"{name} cannot be loaded: {hub.constants.ENDPOINT} does not answer: {error}",
            hint="Give a file or a folder, or set $HF_HUB_OFFLINE to load a copy that was downloaded before.",
        ) from error


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


def parquet(path: Path, on_read: Callable[[int], None]) -> RecordBatches:
    """Open a Parquet file; `on_read` is called with the bytes of its rows so far, as Arrow has them in memory.

    Raises:
        DataError: the package for it is not installed; or, once it is read, it is no such file.
    """
    library = _import("pyarrow.parquet", path)

    def batches() -> Iterator[list[dict[str, Any]]]:
        size = 0
        try:
            with library.ParquetFile(path, buffer_size=BUFFER) as file:
                for batch in file.iter_batches(BATCH_ROWS):
                    size += batch.nbytes
                    on_read(size)
                    yield batch.to_pylist()
        except ValueError as error:  # the base class of pyarrow's own errors
            raise DataError(f"{path} is not a Parquet file: {error}", hint="Copy it again.") from error

    return batches


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
