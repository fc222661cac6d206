"""`loradeck ls`: the adapters in a folder, from their headers, without torch."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loradeck.cli.display.text import columns, fitting, format_list, format_size, print_json, printable
from loradeck.cli.options import AsJson, Task
from loradeck.errors import AdapterError, LoradeckError

if TYPE_CHECKING:
    from loradeck.cli.summary import Summary

Loading: TypeAlias = Callable[[Path], LoradeckError | None]

CELL = 60  # characters
NUMBERS = {"r", "alpha", "modules", "parameters", "size", "loss", "valid loss", "accuracy"}  # aligned on the right
DROPPED = (
    "modules",
    "parameters",
    "alpha",
    "targets",
    "dataset",
    "base",
    "size",
    "r",
    "accuracy",
    "loss",
    "date",
    "valid loss",
)  # in this order, if it is narrow: many adapters in several tables could not be read
MANY = 2000  # folders; more take long enough on a slow disk to show how far the listing is


def ls(
    folder: str = "adapters",
    /,
    *,
    base: str | None = None,
    task: Task = "generate",
    as_json: AsJson = False,
) -> None:
    """List the adapters in a folder.

    An adapter that is invalid, or that a server could not offer, is listed with
    the reason. What training recorded of its results is shown.

    Args:
        folder: A folder of adapters, or one adapter; or the URL of a store, of which nothing is downloaded.
        base: Load every adapter on this base, and say which do not fit it or
            hold NaN: a folder, a hub id, a .gguf file, or smollm2-135m.
    """
    from loradeck.store import is_url

    why_not_loaded = _loading(base, task) if base else None
    lines = _in_store(folder, why_not_loaded) if is_url(folder) else _in_folder(Path(folder), why_not_loaded)
    _print(folder, *lines, as_json=as_json)


def _in_folder(folder: Path, why_not_loaded: Loading | None) -> "tuple[list[Summary], list[dict[str, str]]]":
    """Return the lines of the adapters that can be read, and of those that cannot."""
    from loradeck.cli import summary
    from loradeck.lora.manifest import is_adapter, read_folder
    from loradeck.store import latest_versions, versions_beside, why_not_served

    summaries: list[summary.Summary] = []
    broken: list[dict[str, str]] = []
    for path in _watched(_folders(folder)):
        try:
            line = summary.summarise(read_folder(path))
        except AdapterError as error:
            if is_adapter(path):
                broken.append(summary.broken(path, error))
            continue
        summaries.append(
            _with_reason(line, why_not_served(line.name) or (why_not_loaded(path) if why_not_loaded else None))
        )
    names = [*(each.name for each in summaries), *(each["name"] for each in broken), *versions_beside(folder)]
    latest = latest_versions(names)
    return [replace(each, latest=each.name in latest) for each in summaries], broken


def _in_store(location: str, why_not_loaded: Loading | None) -> "tuple[list[Summary], list[dict[str, str]]]":
    """Return the same of a store elsewhere. Files are downloaded only to be loaded."""
    from loradeck.cli import summary
    from loradeck.store import AdapterStore

    store = AdapterStore(location)
    contents = store.contents()
    latest = dict(sorted(contents))
    summaries: list[summary.Summary] = []
    broken: list[dict[str, str]] = []
    for (name, number), version in sorted(contents.items(), key=lambda item: item[0]):
        if isinstance(version, LoradeckError):
            broken.append(summary.broken(f"{store.location}/{name}@{number}", version))
            continue
        line = replace(summary.summarise_stored(version, store.location), latest=latest[name] == number)
        summaries.append(_with_reason(line, why_not_loaded(store.find(version.spec).path) if why_not_loaded else None))
    return summaries, broken


def _with_reason(line: "Summary", error: LoradeckError | None) -> "Summary":
    return replace(line, cannot_be_served=". ".join(str(error).splitlines())) if error else line


def _print(folder: str, summaries: "list[Summary]", broken: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        print_json({"adapters": summaries, "broken": broken})
        return
    if summaries:
        print(table(summaries))
    elif not broken:
        print(f"no adapters in {folder}")
    for each in broken:
        print(printable(f"{each['name']} is invalid: {each['error']}"))
    for each in summaries:
        if each.cannot_be_served:
            print(printable(f"{each.name} cannot be served: {each.cannot_be_served}"))


def table(summaries: "Sequence[Summary]") -> str:
    """Return summaries as a table; versions and results have a column if any adapter has them.

    A narrow terminal gets the columns for which it has room, and a line that names the others.
    """
    heads = ["name", "r", "alpha", "targets", "modules", "parameters", "size", "base"]
    rows = [
        [
            each.name,
            format_list(each.r, 3),
            f"{each.lora_alpha:g}",
            format_list(each.targets, 2),
            f"{each.modules}",
            f"{each.parameters:,}",
            format_size(each.bytes),
            _cell(each.base or "not recorded"),
        ]
        for each in summaries
    ]
    versions = any(each.version for each in summaries)
    if versions:
        _add(heads, rows, "version", (_state(each) for each in summaries))
    for key, head in (("loss", "loss"), ("validation_loss", "valid loss"), ("accuracy", "accuracy")):
        numbers = [each.results.get(key) for each in summaries]
        if any(number is not None for number in numbers):
            _add(heads, rows, head, ("-" if number is None else f"{number:.4g}" for number in numbers))
    datasets = any(each.dataset for each in summaries)
    if datasets:
        _add(heads, rows, "dataset", (_cell(each.dataset or "-") for each in summaries))
    if versions or datasets or any(each.results for each in summaries):
        _add(heads, rows, "date", (each.date[:10] for each in summaries))
    shown = fitting([heads, *rows], DROPPED)
    text = columns(shown, right=[at for at, head in enumerate(shown[0]) if head in NUMBERS])
    missing = [head for head in heads if head not in shown[0]]
    return f"{text}\nno room for {', '.join(missing)}; --json has all" if missing else text


def _state(line: "Summary") -> str:
    if line.latest:
        return "latest"
    return "older" if line.version else "unpublished"


def _cell(text: str) -> str:
    """Return a text of a stranger's file on one line, and not too long for a table."""
    line = " ".join(text.split())
    return line if len(line) <= CELL else f"{line[: CELL - 3]}..."


def _add(heads: list[str], rows: list[list[str]], head: str, cells: Iterable[str]) -> None:
    heads.append(head)
    for row, cell in zip(rows, cells, strict=True):
        row.append(cell)


def _loading(base: str, task: Task) -> Loading:
    """Load a base; return a function that loads an adapter on it, and returns why that fails."""
    from loradeck.base.load import Base
    from loradeck.lora.bank import Bank

    bank = Bank(Base.load(base, task=task).model)

    def why_not(folder: Path) -> AdapterError | None:
        try:
            bank.unload(bank.load(folder, "adapter"))
        except AdapterError as error:
            return error
        return None

    return why_not


def _watched(folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the folders; on a terminal, show how far a long listing is."""
    shows = len(folders) > MANY and sys.stderr.isatty()
    for index, folder in enumerate(folders):
        if shows and index % 500 == 0:
            print(f"\r{index:,} of {len(folders):,} folders", end="", file=sys.stderr, flush=True)
        yield folder
    if shows:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _folders(folder: Path) -> list[Path]:
    """Return the folder and its subfolders, except hidden ones, which are being written or removed.

    They are sorted by name, versions by number.
    """
    from loradeck.store import split_spec

    try:
        with os.scandir(folder) as entries:
            names = [each.name for each in entries if not each.name.startswith(".") and each.is_dir()]
    except NotADirectoryError:
        raise AdapterError(f"{folder} is a file", hint="Give the folder that contains your adapters.") from None
    except FileNotFoundError:
        raise AdapterError(
            f"no folder {folder}", hint="Give another, or make one with `loradeck demo` or `loradeck train`."
        ) from None
    except OSError as error:
        raise AdapterError(f"cannot read {folder}: {error.strerror}") from error
    return [folder, *(folder / name for name in sorted(names, key=split_spec))]
