"""Adapters on the Hugging Face hub. A repository's adapter lies at its root, as PEFT's push_to_hub puts it there.

`owner/name` is the last commit of the main branch, `owner/name@revision` a branch, a tag or a commit. Only an adapter's
files are downloaded: never code, never pickles.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loradeck.errors import AdapterError, LoradeckError
from loradeck.hub import TIMEOUT, is_hub_id, why_refused, why_unreachable
from loradeck.lora.folder import CARD, CONFIG
from loradeck.lora.manifest import INDEX
from loradeck.tokenizer_files import NAMES as TOKENIZER

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

ADAPTER = (CONFIG, "adapter_model*.safetensors", INDEX)
FILES = (*ADAPTER, CARD, *sorted(TOKENIZER))
MOST = 8 << 30  # bytes of an adapter

log = logging.getLogger(__name__)


def local(source: str | Path) -> Path:
    """Return an adapter's folder; that of a hub id, owner/name or owner/name@revision, is downloaded first.

    A Path is always a path, and so is a text that begins as one (./, ../, ~ or /) or whose first part is a folder here,
    so that a misspelt one does not reach the hub.

    Raises:
        AdapterError: it is a URL; or the hub has no such adapter, does not show it, or cannot be reached and the cache
            has none.
    """
    if isinstance(source, str) and "://" in source:
        raise AdapterError(
            f"{source} is a URL, not a folder",
            hint="Download it first.",
            python="AdapterStore(URL).find(NAME).path is its folder.",
            cli="`loradeck pull` does.",
        )
    if isinstance(source, Path) or _is_path(source):
        return Path(source)
    hub_id, _, revision = source.partition("@")
    return download(hub_id, revision)


def has_adapter(source: str) -> bool:
    """Return whether a text is the hub id of an adapter: by the hub or, if that cannot be asked, by the cache."""
    if _is_path(source):
        return False
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    hub_id, _, revision = source.partition("@")
    try:
        url = huggingface_hub.hf_hub_url(hub_id, CONFIG, revision=revision or None)
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)
    except EntryNotFoundError:
        return False
    except Exception:  # of the HTTP library, which is the hub client's own choice
        return isinstance(huggingface_hub.try_to_load_from_cache(hub_id, CONFIG, revision=revision or None), str)
    return True


def download(hub_id: str, revision: str = "", *, most: int = MOST) -> Path:
    """Return the folder, in the hub's cache, of a repository's adapter; its name is the commit.

    What is there already is not downloaded again. Each file has the hash that the hub states.

    Raises:
        AdapterError: there is no such adapter, it is not shown, or has more than `most` bytes; a file is not what the
            hub states; or the hub cannot be reached and the cache has none.
    """
    import huggingface_hub

    name = f"{hub_id}@{revision}" if revision else hub_id
    try:
        info = huggingface_hub.HfApi().model_info(
            hub_id, revision=revision or None, files_metadata=True, timeout=TIMEOUT
        )
    except Exception as error:  # of the HTTP library, which is the hub client's own choice
        return _cached(hub_id, revision, name, error)
    every = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    files = {path: file for path, file in every.items() if any(fnmatchcase(path, pattern) for pattern in FILES)}
    _check(name, [*every], files, most)
    try:
        # The revision rather than the commit, so that the cache knows it when the hub cannot be reached.
        folder = Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision or None, allow_patterns=[*map(escape, files)])
        )
    except Exception as error:
        raise _error(hub_id, name, error) from error
    if folder.name != info.sha:
        raise AdapterError(f"{name} changed while it was downloaded", hint="Try again.")
    for path, file in files.items():
        _verify(name, folder / path, file)
    return folder


def with_hub_ids(text: str) -> str:
    """Return a text with owner/name@commit in place of folders in the cache."""
    if "models--" not in text:
        return text
    from huggingface_hub import constants

    folder = re.escape(constants.HF_HUB_CACHE) + r"/models--([\w.-]+?)--([\w.-]+)/snapshots/(\w+)"
    return re.sub(folder, r"\1/\2@\3", text)


def upload(folder: Path, hub_id: str, *, revision: str = "", private: bool = True, message: str = "") -> str:
    """Make an adapter the content of a repository, which is created if it is not there; return the commit.

    Other files of the repository stay; those of an older adapter do not. `private` is for a new repository.

    Raises:
        AdapterError: the hub refuses it, or cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(hub_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=hub_id,
            folder_path=folder,
            revision=revision or None,
            allow_patterns=[*FILES],
            delete_patterns=[*ADAPTER],
            commit_message=message or f"Upload the adapter {folder.resolve().name}",
        )
    except Exception as error:
        raise _error(hub_id, hub_id, error) from error
    return commit.oid


def _is_path(source: str) -> bool:
    path = Path(source)
    try:
        return path.exists() or path.parent.exists() or not is_hub_id(source.partition("@")[0])
    except (OSError, ValueError):  # no path at all: whoever reads it says so
        return True


def _check(name: str, every: list[str], files: Mapping[str, "RepoSibling"], most: int) -> None:
    """Refuse a repository without an adapter of ours, and one that is too large, before anything is downloaded."""
    folders = sorted({path.rpartition("/")[0] for path in every if path.endswith(f"/{CONFIG}")})
    hint = "Name the repository of an adapter."
    if CONFIG not in files and folders:
        shown = ", ".join(folders[:5]) + (", …" if len(folders) > 5 else "")
        what = f"has no adapter at its root, but in the folders {shown}"
        hint = "Download it with `hf download`, and give that folder."
    elif CONFIG not in files:
        what = "is a model, not an adapter" if "config.json" in every else f"holds no {CONFIG}"
    elif not any(path.endswith(".safetensors") for path in files):
        what = "holds no adapter_model.safetensors" + (", only a pickle" if "adapter_model.bin" in every else "")
        hint = "Pickles are not downloaded, because they can run code."
    elif (size := sum(file.size or 0 for file in files.values())) > most:
        what, hint = f"has {size} bytes, more than the limit of {most}", ""
    else:
        return
    raise AdapterError(f"{name} {what}", hint=hint)


def _verify(name: str, path: Path, file: "RepoSibling") -> None:
    """Compare a file with what the hub states: the sha256 of a large file, of others git's hash."""
    with path.open("rb") as content:
        if file.lfs is not None:
            stated, digest = file.lfs["sha256"], hashlib.file_digest(content, "sha256")
        else:
            stated, digest = file.blob_id, hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
            digest.update(content.read())
    if stated is not None and digest.hexdigest() != stated:
        path.resolve().unlink()  # else the cache would give it again
        path.unlink(missing_ok=True)
        raise AdapterError(
            f"{file.rfilename} of {name} is not what the hub states: its hash is {digest.hexdigest()}, not {stated}",
            hint="It was damaged on its way or in the cache, and is removed. Try again.",
        )


def _cached(hub_id: str, revision: str, name: str, error: Exception) -> Path:
    """Return the folder of the cache if the hub could not be asked."""
    import huggingface_hub

    if why_refused(hub_id, "adapter", error):
        raise _error(hub_id, name, error) from error
    try:
        folder = huggingface_hub.snapshot_download(hub_id, revision=revision or None, local_files_only=True)
        if not (Path(folder) / CONFIG).is_file():
            raise FileNotFoundError(CONFIG)
    except OSError:
        raise AdapterError(
            f"{name} is not in the cache, and {why_unreachable(error)}", hint="Check the network, or give a folder."
        ) from error
    log.warning("%s is that of the cache: %s", name, why_unreachable(error))
    return Path(folder)


def _error(hub_id: str, name: str, error: Exception) -> LoradeckError:
    message, hint = why_refused(hub_id, "adapter", error) or (f"{name}: {why_unreachable(error)}", "Try again later.")
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) and "gated" not in message:
        hint = "Log in with a token that may do so: hf auth login"
    return AdapterError(message, hint=hint)
