"""`loradeck rm`: remove adapters from the disk, and only the files of an adapter, or from a store elsewhere."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loradeck.cli.display.text import format_size, printable
from loradeck.cli.options import Yes
from loradeck.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class Removal:
    """An adapter's version that is to be removed."""

    shown: str
    """Its folder or URL."""
    nbytes: int | None
    """Bytes that this frees; None if that is not known."""
    remove: Callable[[], object] = field(compare=False)


def rm(*adapters: Annotated[str, Parameter(required=True)], yes: Yes = False) -> int:
    """Remove adapters from the disk, or from a store elsewhere, after asking.

    A published adapter is removed with all its versions by its name, as in
    adapters/poet, or one version at a time, as in adapters/poet@2. A folder that
    contains other files stays, with these files.

    Args:
        adapters: Adapters' folders, or names in a store, as in adapters/poet or s3://bucket/adapters/poet.
    """
    from loradeck.store import is_url

    removals = list(
        dict.fromkeys(
            removal
            for adapter in adapters
            for removal in (_in_store(adapter) if is_url(adapter) else map(_in_folder, _folders(Path(adapter))))
        )
    )
    for removal in removals:
        size = "" if removal.nbytes is None else f"  {format_size(removal.nbytes)}"
        print(printable(f"{removal.shown}{size}"))
    if not yes and not confirmed("remove this adapter?" if len(removals) == 1 else f"remove these {len(removals)}?"):
        print("nothing was removed")
        return 1
    for removal in removals:
        try:
            removal.remove()
        except OSError as error:
            raise AdapterError(f"cannot remove {removal.shown}: {error.strerror}") from error
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


def _in_folder(folder: Path) -> Removal:
    from loradeck.backends.folder import remove_adapter

    return Removal(str(folder), size_of(folder), partial(remove_adapter, folder.absolute()))


def _in_store(url: str) -> Iterator[Removal]:
    """Yield a version of a store elsewhere, or all versions of a name, the oldest first."""
    from loradeck.cli.store_name import StoreName
    from loradeck.stored import Stored

    target = StoreName.of(url)
    name = target.name.partition("@")[0]
    for number in target.store.numbers(target.name):
        spec, version = f"{name}@{number}", target.store.listed(name).get(number)
        nbytes = version.facts.nbytes if isinstance(version, Stored) else None
        yield Removal(f"{target.store.location}/{spec}", nbytes, partial(target.store.remove, spec))


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
