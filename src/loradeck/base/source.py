"""Where a base comes from: the hub, with or without a network, and names close to one that is not there."""

import difflib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

from loradeck.base import SMOLLM2
from loradeck.errors import BaseModelError
from loradeck.hub import TIMEOUT, why_refused, why_unreachable

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HINT = f"Give a folder with a transformers model, a hub id such as {SMOLLM2_HUB_ID}, a .gguf file, or {SMOLLM2}."
SHOWN = 3


def reach(hub_id: str) -> str:
    """Return what to load a hub's model from: its id or, if the hub cannot be reached, its folder in the cache.

    Raises:
        BaseModelError: the hub has no such model, or cannot be reached and the cache has none.
    """
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(hub_id, "config.json"), timeout=TIMEOUT)
    except EntryNotFoundError:  # an adapter, perhaps: its files say more
        return hub_id
    except Exception as error:  # of the HTTP library, which is the hub client's own choice
        if refusal := why_refused(hub_id, "model", error):
            message, hint = refusal
            missing = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
            raise BaseModelError(message, hint=(missing and close_names(hub_id)) or hint) from error
        try:
            return huggingface_hub.snapshot_download(hub_id, local_files_only=True)
        except OSError:
            pass
        raise BaseModelError(
            f"{hub_id} is not in the cache, and {why_unreachable(error)}",
            hint=close_names(hub_id) or "Check the network, or give a folder or a .gguf file.",
        ) from error
    return hub_id


def close_names(source: str) -> str:
    """Return a hint with the bases here, and in the hub's cache, whose names are close; empty if there are none."""
    names = {name.lower(): name for name in _known(source) if name != source}
    close = difflib.get_close_matches(source.lower(), names, n=SHOWN)
    return f"Did you mean {' or '.join(names[name] for name in close)}?" if close else ""


def _known(source: str) -> Iterator[str]:
    yield from (SMOLLM2, SMOLLM2_HUB_ID)
    parent = Path(source).parent
    try:
        for path in parent.iterdir():
            if path.suffix.lower() == ".gguf" or (path / "config.json").is_file():
                yield str(path)
        for path in Path(constants.HF_HUB_CACHE).glob("models--*--*"):
            yield path.name.removeprefix("models--").replace("--", "/")
    except (OSError, ValueError):
        return
