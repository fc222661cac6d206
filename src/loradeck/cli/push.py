"""`loradeck push`: an adapter to the Hugging Face hub, or to a store elsewhere."""

from typing import TYPE_CHECKING

from loradeck.cli.display.text import format_size, print_json, printable
from loradeck.cli.options import AsJson
from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from loradeck.lora.manifest import AdapterFiles


def push(
    adapter: str,
    target: str,
    /,
    *,
    public: bool = False,
    message: str = "",
    as_json: AsJson = False,
) -> None:
    """Upload an adapter to the Hugging Face hub, or to a store elsewhere.

    The adapter is read completely first. Its configuration, tensors and card are
    uploaded, and its tokenizer if it has one; nothing else of its folder is. The
    hub's token is that of `hf auth login`, or HF_TOKEN. In a store it becomes the
    latest version of a name, unless it is that already.

    Args:
        adapter: An adapter's folder.
        target: A repository of the hub, as owner/name or owner/name@branch, which is created if it is not there; or
            STORE/NAME, where the store is a URL: s3://bucket/adapters/poet.
        public: Let everybody see a repository that is created; else only its owner can.
        message: The message of the commit.
    """
    from loradeck.cli.adapter_folder import read_adapter
    from loradeck.cli.summary import locate
    from loradeck.hub import is_hub_id
    from loradeck.store import is_url

    hub_id, _, branch = target.partition("@")
    if is_url(target):
        if public or message:
            raise ConfigError("--public and --message are for the hub", hint="Leave them out for a store.")
        _publish(read_adapter(locate(adapter)), target, as_json=as_json)
    elif is_hub_id(hub_id):
        files = read_adapter(locate(adapter))
        _upload(files, hub_id, branch, public=public, message=message, as_json=as_json)
    else:
        raise ConfigError(
            f"{target} is not a repository of the hub",
            hint="Give owner/name or owner/name@branch, or a URL: STORE/NAME, as in s3://bucket/adapters/poet.",
        )


def _publish(files: "AdapterFiles", target: str, *, as_json: bool) -> None:
    from loradeck.cli.publish import print_version
    from loradeck.cli.store_name import StoreName
    from loradeck.stored import read_stored

    name = StoreName.of(target)
    version, is_new = name.publish_new(read_stored(name.name, 0, files.folder, None))
    what = f", {'now the latest version' if is_new else 'the latest version already'} of {version.name}"
    print_version(version, name.shown(version.version), what, as_json=as_json, new=is_new)


def _upload(files: "AdapterFiles", hub_id: str, branch: str, *, public: bool, message: str, as_json: bool) -> None:
    from loradeck.lora import hub
    from loradeck.lora.adapter import Adapter

    Adapter.from_files(files, check_copy=lambda *_: None)  # only a bank can compare copies with its base
    commit = hub.upload(files.folder, hub_id, revision=branch, private=not public, message=message)
    if as_json:
        print_json({"repository": hub_id, "commit": commit, "bytes": files.nbytes})
        return
    print(printable(f"{hub_id}: {format_size(files.nbytes)}, commit {commit[:12]}"))
