"""An adapter's folder, hub id or URL as an argument: its headers, or the close names of one that is not there."""

import difflib
import os
from pathlib import Path

from loradeck.errors import AdapterError
from loradeck.lora import hub
from loradeck.lora.manifest import AdapterFiles, is_adapter, read_folder

DEFAULT = Path("adapters")  # where `loradeck demo` writes, and `loradeck ls` looks
SHOWN = 3
IN_USE: list[object] = []  # adapters of stores elsewhere, which the cache keeps until this command ends


def local(adapter: str | Path) -> Path:
    """Return an adapter's folder; that of a hub id, or of STORE/NAME at a URL, is downloaded first.

    Raises:
        LoradeckError: as `AdapterStore.find` and `hub.local`.
    """
    from loradeck.cli.store_name import StoreName
    from loradeck.store import is_url

    if isinstance(adapter, Path) or not is_url(adapter):
        return hub.local(adapter)
    target = StoreName.of(adapter)
    stored = target.store.find(target.name)
    IN_USE.append(stored)
    return stored.path


def read_adapter(folder: str | Path) -> AdapterFiles:
    """Read the headers of an adapter's folder, as read_folder does; the error of a missing one lists close names.

    That of a hub id or a URL is downloaded first.

    Raises:
        AdapterError: the folder is not a complete adapter, or the hub or the store does not show it.
    """
    folder = local(folder)
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
