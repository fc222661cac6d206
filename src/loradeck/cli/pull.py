"""`loradeck pull`: an adapter of the Hugging Face hub or of a store elsewhere, as a new version in a store."""

from typing import TYPE_CHECKING

from loradeck.cli.adapter_folder import DEFAULT
from loradeck.cli.options import AsJson
from loradeck.cli.publish import print_version
from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from loradeck.stored import Stored


def pull(source: str, name: str | None = None, /, *, as_json: AsJson = False) -> None:
    """Download an adapter from the Hugging Face hub, or from a store elsewhere, into a store.

    Only an adapter's own files are downloaded, never code or pickles, and their
    hashes must be those that the hub or the store states. The hub's token is that
    of `hf auth login`, or HF_TOKEN. The store's latest version stays if it is the
    same adapter.

    Args:
        source: A repository of the hub, as owner/name, or owner/name@revision with a branch, tag or commit; or
            STORE/NAME or STORE/NAME@VERSION, where the store is a URL: s3://bucket/adapters/poet.
        name: The name in a store; by default adapters/name.
    """
    from loradeck.cli.store_name import StoreName
    from loradeck.lora.names import valid_name
    from loradeck.store import is_url

    facts: dict[str, object]
    if is_url(source):
        origin = StoreName.of(source)
        stored = origin.store.find(origin.name)
        what = f"{origin.store.location}/{stored.spec}"
        facts = {"source": what}
    else:
        stored = _downloaded(source)
        what = f"{stored.name} at {stored.path.name[:12]}"
        facts = {"repository": stored.name, "commit": stored.path.name}
    target = StoreName.of(name or str(DEFAULT / valid_name(stored.name.rpartition("/")[2])))
    version, is_new = target.publish_new(stored)
    state = "now the latest version" if is_new else "the latest version already"
    shown = target.shown(version.version)
    print_version(version, shown, f" of {what}, {state}", as_json=as_json, **facts, new=is_new)


def _downloaded(repository: str) -> "Stored":
    """Return the adapter of a repository of the hub, which is in the hub's cache then."""
    from loradeck.hub import is_hub_id
    from loradeck.lora import hub
    from loradeck.stored import read_stored

    hub_id, _, revision = repository.partition("@")
    if not is_hub_id(hub_id):
        raise ConfigError(
            f"{repository} is not a repository of the hub",
            hint="Give owner/name or owner/name@revision, or the URL of an adapter in a store.",
        )
    return read_stored(hub_id, 0, hub.download(hub_id, revision), None)
