"""`loradeck pull`: an adapter of the Hugging Face hub, as a new version in a store."""

from contextlib import suppress
from pathlib import Path

from loradeck.cli.adapter_folder import DEFAULT
from loradeck.cli.options import AsJson
from loradeck.cli.publish import print_version
from loradeck.errors import ConfigError, LoradeckError


def pull(repository: str, name: Path | None = None, /, *, as_json: AsJson = False) -> None:
    """Download an adapter from the Hugging Face hub into a store.

    Only an adapter's own files are downloaded, never code or pickles, and their
    hashes must be the hub's. The token is that of `hf auth login`, or HF_TOKEN.
    The store's latest version stays if it is the same adapter.

    Args:
        repository: The repository, as owner/name, or owner/name@revision with a branch, tag or commit.
        name: The name in a store; by default adapters/name.
    """
    from loradeck.hub import is_hub_id
    from loradeck.lora import hub
    from loradeck.lora.names import valid_name
    from loradeck.store import AdapterStore
    from loradeck.stored import read_stored

    hub_id, _, revision = repository.partition("@")
    if not is_hub_id(hub_id):
        raise ConfigError(
            f"{repository} is not a repository of the hub", hint="Give owner/name or owner/name@revision."
        )
    path = name or DEFAULT / valid_name(hub_id.rpartition("/")[2])
    folder = hub.download(hub_id, revision)
    store = AdapterStore(path.parent)
    downloaded = read_stored(path.name, 0, folder, None)
    version = None
    with suppress(LoradeckError):  # there is none yet, or it is unusable
        version = store.find(path.name)
    is_new = version is None or not version.equals(downloaded)
    if version is None or is_new:
        version = store.publish(path.name, folder)
    state = "now the latest version" if is_new else "the latest version already"
    what = f" of {hub_id} at {folder.name[:12]}, {state}"
    more = {"repository": hub_id, "commit": folder.name, "new": is_new}
    print_version(version, path.parent, what, as_json=as_json, **more)
