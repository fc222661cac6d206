"""`loradeck publish`: a new version of an adapter in a store."""

from pathlib import Path
from typing import TYPE_CHECKING

from loradeck.cli.display.text import format_size, print_json, printable
from loradeck.cli.options import AsJson
from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from loradeck.stored import Stored


def publish(adapter: str, name: str, /, *, as_json: AsJson = False) -> None:
    """Publish an adapter as the latest version of a name.

    The adapter is read completely, then copied: its configuration, tensors, card
    and tokenizer. The version does not change any more, whatever happens to its
    source.

    Args:
        adapter: An adapter's folder, such as that of a training run, or of an
            older version.
        name: The name in a store, as in adapters/poet.
    """
    from loradeck.cli.adapter_folder import read_adapter
    from loradeck.cli.summary import locate
    from loradeck.store import AdapterStore, is_store

    folder = Path(name)
    if not folder.name or "/" not in name.rstrip("/") or is_store(folder):
        raise ConfigError(f"{name} does not name an adapter in a store", hint="Give STORE/NAME, as in adapters/poet.")
    store = AdapterStore(folder.parent)
    version = store.publish(folder.name, read_adapter(locate(adapter)).folder)
    print_version(version, folder.parent, f", now the latest version of {version.name}", as_json=as_json)


def print_version(version: "Stored", store: Path, what: str, *, as_json: bool, **more: object) -> None:
    """Print a version that is in a store now: its folder and size, and then `what`; as JSON, also `more`."""
    path = store / version.path.name
    if as_json:
        facts = {"name": version.name, "version": version.version, "folder": str(path)}
        print_json({**facts, **more, "bytes": version.facts.nbytes, "sha256": version.sha256()})
        return
    print(printable(f"{path}: {format_size(version.facts.nbytes)}{what}"))
