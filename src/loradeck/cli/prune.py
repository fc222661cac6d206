"""`loradeck prune`: remove old versions from a store."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loradeck.cli.display.text import format_size, print_json, printable
from loradeck.cli.options import AsJson, Yes
from loradeck.errors import ConfigError


def prune(
    store: Path,
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
        store: A folder of adapters, or one adapter in it, as in adapters/poet.
        keep: How many versions of each adapter to keep.
        dry_run: Only say which versions would be removed.
    """
    from loradeck.cli.rm import confirmed, size_of
    from loradeck.store import AdapterStore, is_store

    if keep < 1:
        raise ConfigError(f"--keep is {keep}, not 1 or more", hint="`loradeck rm` removes whole adapters.")
    whole = is_store(store)
    folder = store if whole else store.parent
    opened = AdapterStore(folder)
    old = {
        name: [number for number in opened.versions(name) if number][:-keep]
        for name in (opened.names() if whole else [store.name])
    }
    paths = [folder / opened.path(name, number).name for name, numbers in old.items() for number in numbers]
    sizes = {path: size_of(path) for path in paths}
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
        print_json({"removed": [str(path) for path in sizes], "bytes": sum(sizes.values()), "dry_run": dry_run})
    elif not sizes:
        print(f"no adapter has more than {keep} version{'s' * (keep > 1)}; nothing was removed")
    else:
        what = f"{count(len(sizes))}, {format_size(sum(sizes.values()))}"
        print(f"would remove {what}" if dry_run else f"removed {what}")
    return 0


def count(versions: int) -> str:
    """Return a number of versions in words."""
    return "1 version" if versions == 1 else f"{versions:,} versions"
