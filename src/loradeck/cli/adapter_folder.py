"""An adapter's folder or hub id as an argument: its headers, or the close names of one that is not there."""

import difflib
import os
from pathlib import Path

from loradeck.errors import AdapterError
from loradeck.lora import hub
from loradeck.lora.manifest import AdapterFiles, is_adapter, read_folder

DEFAULT = Path("adapters")  # where `loradeck demo` writes, and `loradeck ls` looks
SHOWN = 3


def read_adapter(folder: str | Path) -> AdapterFiles:
    """Read the headers of an adapter's folder, as read_folder does; the error of a missing one lists close names.

    That of a hub id is downloaded first.

    Raises:
        AdapterError: the folder is not a complete adapter, or the hub does not show it.
    """
    folder = hub.local(folder)
    if not os.path.exists(folder):  # noqa: PTH110 - Path.exists raises for an invalid path
        raise AdapterError(f"{folder} is not a folder", hint=close_adapters(folder))
    return read_folder(Path(folder))


def close_adapters(folder: str | Path) -> str:
    """Return a hint with the adapters next to a folder, and in `adapters`, whose names are close to its own."""
    path = Path(folder)
    folders = {each.name: str(each) for place in (DEFAULT, path.parent) for each in _adapters(place)}
    close = difflib.get_close_matches(path.name, folders, n=SHOWN, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(folders[name] for name in close)}?"
    names = sorted(folders.values())
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return (
        f"There are: {shown}." if names else "Give an adapter's folder; `loradeck train` and `loradeck demo` make one."
    )


def _adapters(place: Path) -> list[Path]:
    try:
        return [each for each in place.iterdir() if not each.name.startswith(".") and is_adapter(each)]
    except (OSError, ValueError):
        return []
