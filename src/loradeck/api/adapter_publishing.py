"""Adapters that requests bring into the store: each is loaded on the base before anybody can see it."""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loradeck.api.auth import ApiKey
from loradeck.api.errors import HttpError
from loradeck.api.model_name import BASE
from loradeck.api.state import ServerState
from loradeck.errors import AdapterError, AdapterNameError, UnknownAdapterError
from loradeck.lora.names import check_name
from loradeck.stored import read_stored

if TYPE_CHECKING:
    from loradeck.store import AdapterStore
    from loradeck.stored import Stored

WORK = ".new."  # how the names of folders begin that are no adapters yet
FORGOTTEN = 86_400  # seconds

log = logging.getLogger(__name__)


def store_of(state: ServerState) -> "AdapterStore":
    """Return the server's store.

    Raises:
        HttpError: 404, it has none.
    """
    if state.engine.store is None:
        raise HttpError(404, "This server has no store of adapters.")
    return state.engine.store


def check_new_name(state: ServerState, key: ApiKey, name: str) -> None:
    """Check that a key may publish an adapter of this name.

    Raises:
        HttpError: 400, the name is invalid or the base's; 403.
    """
    try:
        check_name(name)
    except AdapterNameError as error:
        raise HttpError(400, error.message, param="name", hint=error.hint) from error
    if state.names.parse(name, "name") == BASE:
        raise HttpError(400, f"The name {name!r} is the base's.", param="name")
    key.check_create(name, "name")


@contextmanager
def work_folder(store: "AdapterStore") -> Iterator[Path]:
    """Yield a folder beside the store's adapters, which nobody sees; at the end it is removed.

    What a kill left of older ones is removed too, after a day without a change.

    Raises:
        AdapterError: the store cannot be changed.
    """
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        for path in store.folder.glob(f"{WORK}*"):
            if _changed(path) < time.time() - FORGOTTEN:
                shutil.rmtree(path, ignore_errors=True)
        folder = tempfile.TemporaryDirectory(prefix=WORK, dir=store.folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise AdapterError(f"the store {store.folder} cannot be changed: {error.strerror}") from error
    with folder as path:
        yield Path(path)


def _changed(folder: Path) -> float:
    """Return when a folder, or a file in it, was last changed, in seconds since 1970; now if somebody removes it."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return time.time()


def publish_folder(state: ServerState, name: str, folder: Path, origin: str) -> "Stored":
    """Load the adapter in a folder and publish it, unless it is the latest version already; return that version.

    `origin` says in the log where it comes from.

    Raises:
        LoradeckError: it cannot be used or published; the store and the adapters in memory are as before.
    """
    store = store_of(state)
    source = read_stored(name, 0, folder, None)
    state.engine.tokenizer_of(source)  # raises if it has one that cannot be used
    if not is_latest(store, name, source):
        return publish(state, name, source, origin)
    latest = store.find(name)
    state.engine.adapter_cache.load(latest)
    return latest


def publish(state: ServerState, name: str, source: "Stored", origin: str) -> "Stored":
    """Load an adapter, then publish it: nobody sees a version that cannot be used."""
    store, cache, sha256 = store_of(state), state.engine.adapter_cache, source.sha256()
    was_loaded = cache.tier(sha256) == "device"
    cache.load(source)
    version: Stored | None = None
    try:
        version = store.publish(name, source.path)
        if version.sha256() != sha256:
            raise AdapterError(f"{source.path} changed while it was loaded", hint="Load it again.")
        cache.load(version)
    except BaseException:
        if version is not None:
            store.remove(version.spec)
        if not was_loaded:
            cache.discard(sha256)
        raise
    log.info("published %(adapter)s from %(path)s", {"adapter": version.spec, "path": origin})
    return version


def is_latest(store: "AdapterStore", name: str, source: "Stored") -> bool:
    """Return whether an adapter has the content of a name's latest version, wherever it comes from."""
    try:
        return store.find(name).equals(source)
    except (UnknownAdapterError, AdapterError):
        return False
