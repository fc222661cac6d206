"""`loradeck push`: an adapter to the Hugging Face hub."""

from loradeck.cli.display.text import format_size, print_json, printable
from loradeck.cli.options import AsJson
from loradeck.errors import ConfigError


def push(
    adapter: str,
    repository: str,
    /,
    *,
    public: bool = False,
    message: str = "",
    as_json: AsJson = False,
) -> None:
    """Upload an adapter to the Hugging Face hub.

    The adapter is read completely first. Its configuration, tensors and card are
    uploaded, and its tokenizer if it has one; nothing else of its folder is. The
    token is that of `hf auth login`, or HF_TOKEN.

    Args:
        adapter: An adapter's folder.
        repository: The repository, as owner/name, or owner/name@branch; it is created if it is not there.
        public: Let everybody see a repository that is created; else only its owner can.
        message: The message of the commit.
    """
    from loradeck.cli.adapter_folder import read_adapter
    from loradeck.cli.summary import locate
    from loradeck.hub import is_hub_id
    from loradeck.lora import hub
    from loradeck.lora.adapter import Adapter

    hub_id, _, branch = repository.partition("@")
    if not is_hub_id(hub_id):
        raise ConfigError(f"{repository} is not a repository of the hub", hint="Give owner/name or owner/name@branch.")
    files = read_adapter(locate(adapter))
    Adapter.from_files(files, check_copy=lambda *_: None)  # only a bank can compare copies with its base
    commit = hub.upload(files.folder, hub_id, revision=branch, private=not public, message=message)
    if as_json:
        print_json({"repository": hub_id, "commit": commit, "bytes": files.nbytes})
        return
    print(printable(f"{hub_id}: {format_size(files.nbytes)}, commit {commit[:12]}"))
