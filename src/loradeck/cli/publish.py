"""`loradeck publish`: a new version of an adapter in a store."""

from typing import TYPE_CHECKING

from loradeck.cli.display.text import format_size, print_json, printable
from loradeck.cli.options import AsJson

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
        name: The name in a store, as in adapters/poet or s3://bucket/adapters/poet.
    """
    from loradeck.cli.adapter_folder import read_adapter
    from loradeck.cli.store_name import StoreName
    from loradeck.cli.summary import locate

    target = StoreName.of(name)
    version = target.store.publish(target.name, read_adapter(locate(adapter)).folder)
    what = f", now the latest version of {version.name}"
    print_version(version, target.shown(version.version), what, as_json=as_json)


def print_version(version: "Stored", shown: str, what: str, *, as_json: bool, **more: object) -> None:
    """Print a version that is in a store now: as it is `shown`, its size, and then `what`; as JSON, also `more`."""
    if as_json:
        facts = {"name": version.name, "version": version.version, "folder": shown}
        print_json({**facts, **more, "bytes": version.facts.nbytes, "sha256": version.sha256()})
        return
    print(printable(f"{shown}: {format_size(version.facts.nbytes)}{what}"))
