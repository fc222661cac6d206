"""`loradeck rm`: remove adapters from the disk, and only the files of an adapter."""

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loradeck.cli.display.text import format_size, printable
from loradeck.cli.options import Yes
from loradeck.errors import AdapterError, ConfigError


def rm(*adapters: Annotated[Path, Parameter(required=True)], yes: Yes = False) -> int:
    """Remove adapters from the disk, after asking.

    A published adapter is removed with all its versions by its name, as in
    adapters/poet, or one version at a time, as in adapters/poet@2. A folder that
    contains other files stays, with these files.

    Args:
        adapters: Adapters' folders, or names in a store.
    """
    from loradeck.backends.folder import remove_adapter

    folders = list(dict.fromkeys(folder for adapter in adapters for folder in _folders(adapter)))
    for folder in folders:
        print(printable(f"{folder}  {format_size(size_of(folder))}"))
    if not yes and not confirmed("remove this adapter?" if len(folders) == 1 else f"remove these {len(folders)}?"):
        print("nothing was removed")
        return 1
    for folder in folders:
        try:
            remove_adapter(folder.absolute())
        except OSError as error:
            raise AdapterError(f"cannot remove {folder}: {error.strerror}") from error
    print("removed")
    return 0


def size_of(folder: Path) -> int:
    """Return the bytes of the files that a removal takes away."""
    from loradeck.backends.folder import adapter_files

    return sum(file.lstat().st_size for file in adapter_files(folder))


def confirmed(question: str) -> bool:
    """Ask on the terminal.

    Raises:
        ConfigError: there is none.
    """
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on", hint="Pass --yes; nothing was removed.")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _folders(adapter: Path) -> list[Path]:
    """Return an adapter's folder, or the folders of all versions of a name in a store, the oldest first."""
    from loradeck.lora.manifest import is_adapter
    from loradeck.store import AdapterStore, why_not_served

    adapter = Path(os.path.normpath(adapter))
    if adapter.is_symlink():
        raise AdapterError(f"{adapter} is a symbolic link", hint=f"Give its target: {adapter.resolve()}")
    if "@" not in adapter.name and not why_not_served(adapter.name) and adapter.parent.is_dir():
        store = AdapterStore(adapter.parent)
        if adapter.name in store.names():
            return [adapter.parent / store.path(adapter.name, number).name for number in store.versions(adapter.name)]
    if not is_adapter(adapter):
        raise AdapterError(
            f"{adapter} is not an adapter's folder", hint="`loradeck ls` lists the adapters; nothing was removed."
        )
    return [adapter]
