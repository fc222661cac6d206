"""`loradeck rm`: remove adapters from the disk, and only the files of an adapter."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loradeck.cli.display.text import format_size, printable
from loradeck.errors import AdapterError, ConfigError

FILES = ("adapter_config.json", "adapter_model*.safetensors*", "README.md")


def rm(
    *adapters: Annotated[Path, Parameter(required=True)], yes: Annotated[bool, Parameter(alias="-y")] = False
) -> int:
    """Remove adapters from the disk, after asking.

    A folder that contains other files stays, with these files.

    Args:
        adapters: Adapters' folders.
        yes: Do not ask.
    """
    files_of = {folder: _adapter_files(folder) for folder in adapters}
    for folder, files in files_of.items():
        print(printable(f"{folder}  {format_size(sum(file.stat().st_size for file in files))}"))
    if not yes and not _confirmed(len(files_of)):
        print("nothing was removed")
        return 1
    for folder, files in files_of.items():
        _remove(folder.absolute(), [file.absolute() for file in files])
    print("removed")
    return 0


def _adapter_files(folder: Path) -> list[Path]:
    if folder.is_symlink():
        raise AdapterError(f"{folder} is a symbolic link", hint=f"Give its target: {folder.resolve()}")
    files = [file for name in FILES for file in sorted(folder.glob(name)) if file.is_file()]
    if not any(file.name.startswith("adapter_") for file in files):
        raise AdapterError(
            f"{folder} is not an adapter's folder", hint="`loradeck ls` lists the adapters; nothing was removed."
        )
    return files


def _confirmed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on", hint="Pass --yes; nothing was removed.")
    what = "this adapter" if count == 1 else f"these {count} adapters"
    return input(f"remove {what}? [y/N] ").strip().lower() in ("y", "yes")


def _remove(folder: Path, files: list[Path]) -> None:
    """Rename the folder away if it holds nothing else, or its files, the configuration first; then delete them.

    Raises:
        AdapterError: the folder cannot be changed.
    """
    import shutil
    import tempfile

    try:
        trash = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            if set(folder.iterdir()) == set(files):
                folder.rename(trash / folder.name)
            else:
                for file in files:
                    file.rename(trash / file.name)
        finally:
            shutil.rmtree(trash)
    except OSError as error:
        raise AdapterError(f"cannot remove {folder}: {error.strerror}") from error
