"""`loradeck rm`: adapters off the disk. Removes only what makes a folder an adapter; imports no torch."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loradeck.cli.display.text import shown, size
from loradeck.errors import AdapterError, ConfigError

OWN = ("adapter_config.json", "adapter_model*.safetensors*", "README.md")


def rm(adapters: list[Path], /, *, yes: Annotated[bool, Parameter(alias="-y")] = False) -> int:
    """Remove adapters from the disk, after asking.

    Other files in their folders stay, and so do these folders.

    Args:
        adapters: Folders of adapters.
        yes: Do not ask.
    """
    own = {folder: _own_files(folder) for folder in adapters}
    for folder, files in own.items():
        print(shown(f"{folder}  {size(sum(file.stat().st_size for file in files))}"))
    if not yes and not _confirmed(len(own)):
        print("nothing was removed")
        return 1
    for folder, files in own.items():
        _remove(folder.absolute(), [file.absolute() for file in files])
    print("removed")
    return 0


def _own_files(folder: Path) -> list[Path]:
    if folder.is_symlink():
        raise AdapterError(f"{folder} is a link", hint=f"Name what it leads to: {folder.resolve()}")
    files = [file for name in OWN for file in sorted(folder.glob(name)) if file.is_file()]
    if not any(file.name.startswith("adapter_") for file in files):
        raise AdapterError(
            f"{folder} is no adapter's folder", hint="`loradeck ls` shows which are; nothing was removed."
        )
    return files


def _confirmed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask for consent on", hint="Pass --yes; nothing was removed.")
    what = "this adapter" if count == 1 else f"these {count} adapters"
    return input(f"remove {what}? [y/N] ").strip().lower() in ("y", "yes")


def _remove(folder: Path, files: list[Path]) -> None:
    """Set the files aside in one rename where the folder holds nothing else, or the configuration first; then delete.

    Raises:
        AdapterError: the folder cannot be changed.
    """
    import shutil
    import tempfile

    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            if set(folder.iterdir()) == set(files):
                folder.rename(aside / folder.name)
            else:
                for file in files:
                    file.rename(aside / file.name)
        finally:
            shutil.rmtree(aside)
    except OSError as error:
        raise AdapterError(f"{folder} cannot be removed: {error.strerror}") from error
