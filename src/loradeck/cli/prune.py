"""`loradeck prune`: remove old versions from a store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loradeck.cli.display.text import format_size, print_json, printable
from loradeck.cli.options import AsJson, Yes
from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from loradeck.store import AdapterStore


def prune(
    store: str,
    /,
    *,
    keep: Annotated[int, Parameter(alias="-k")] = 2,
    dry_run: bool = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> int:
    """Remove old versions of the adapters in a store, after asking.

    Folders that were never published stay, and so do the numbers of the versions:
    they are not given out again.

    Args:
        store: A folder of adapters or the URL of a store, or one adapter in it, as in adapters/poet.
        keep: How many versions of each adapter to keep.
        dry_run: Only say which versions would be removed.
    """
    from loradeck.cli.rm import confirmed

    if keep < 1:
        raise ConfigError(f"--keep is {keep}, not 1 or more", hint="`loradeck rm` removes whole adapters.")
    opened, names, place = _opened(store)
    old = {name: [number for number in opened.versions(name) if number][:-keep] for name in names}
    sizes = {
        f"{place}{name}@{number}": _size(opened, name, number) for name, numbers in old.items() for number in numbers
    }
    if not as_json:
        for path, size in sizes.items():
            print(printable(f"{path}  {format_size(size)}"))
    removes = bool(sizes) and not dry_run
    if removes and not yes and not confirmed(f"remove {count(len(sizes))}?"):
        print("nothing was removed")
        return 1
    if removes:
        for name in old:
            opened.prune(name, keep=keep)
    if as_json:
        print_json({"removed": [*sizes], "bytes": sum(sizes.values()), "dry_run": dry_run})
    elif not sizes:
        print(f"no adapter has more than {keep} version{'s' * (keep > 1)}; nothing was removed")
    else:
        what = f"{count(len(sizes))}, {format_size(sum(sizes.values()))}"
        print(f"would remove {what}" if dry_run else f"removed {what}")
    return 0


def _opened(store: str) -> "tuple[AdapterStore, list[str], str]":
    """Return a store, the names in it that are meant, and how its versions' folders or URLs begin."""
    from loradeck.cli.store_name import StoreName
    from loradeck.store import AdapterStore, is_store, is_url

    if is_url(store):
        whole = AdapterStore(store)
        if names := whole.names():
            return whole, names, f"{whole.location}/"
        target = StoreName.of(store)
        return target.store, [target.name], f"{target.store.location}/"
    path = Path(store)
    folder = path if is_store(path) else path.parent
    opened = AdapterStore(folder)
    return opened, opened.names() if folder is path else [path.name], f"{folder / '_'}"[:-1]


def _size(store: "AdapterStore", name: str, number: int) -> int:
    from loradeck.cli.rm import size_of
    from loradeck.stored import Stored

    folder = store.path(name, number)
    if folder.is_dir():
        return size_of(folder)
    version = store.listed(name).get(number)
    return version.facts.nbytes if isinstance(version, Stored) else 0


def count(versions: int) -> str:
    """Return a number of versions in words."""
    return "1 version" if versions == 1 else f"{versions:,} versions"
