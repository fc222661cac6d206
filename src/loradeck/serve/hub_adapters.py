"""Adapters of the Hugging Face hub that requests may name, downloaded when one does."""

import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from threading import BoundedSemaphore, Lock

from loradeck.errors import AdapterError, BusyError, UnknownAdapterError
from loradeck.hub import is_hub_id
from loradeck.lora import hub
from loradeck.lora.manifest import stamp
from loradeck.stored import Stored, read_stored

REFRESH = 300.0  # seconds after which the hub is asked again for a name's commit
AT_ONCE = 8  # requests that wait for the hub; each has a thread
NAMES = 4096  # whose commits are remembered


class HubAdapters:
    """The adapters of some repositories. Any thread may call it."""

    def __init__(self, patterns: Sequence[str], most: int) -> None:
        """`patterns` are those of the repositories, as owner/*; `most` the bytes of one adapter."""
        self._patterns, self._most = tuple(patterns), most
        self._found: dict[str, tuple[float, Stored]] = {}
        self._waiting = BoundedSemaphore(AT_ONCE)
        self._lock = Lock()

    def has(self, spec: str) -> bool:
        """Return whether a name is that of a repository which requests may use."""
        hub_id = spec.partition("@")[0]
        return any(fnmatchcase(hub_id, pattern) for pattern in self._patterns) and is_hub_id(hub_id)

    def found(self) -> list[Stored]:
        """Return the adapters that requests have named without a revision."""
        with self._lock:
            return [stored for spec, (_, stored) in self._found.items() if "@" not in spec]

    def find(self, spec: str) -> Stored:
        """Return the adapter of `owner/name` or `owner/name@revision`. A new name is downloaded before this returns.

        Raises:
            UnknownAdapterError: requests may not use this repository.
            AdapterError: the hub has no such adapter, does not show it, or cannot be reached; or it is too large.
            BusyError: too many requests wait for the hub already.
        """
        if not self.has(spec):
            raise UnknownAdapterError(f"no adapter is named {spec[:128]!r}", hint="Use an adapter of this server.")
        stored = self._remembered(spec)
        if stored is not None:
            return stored
        if not self._waiting.acquire(blocking=False):
            raise BusyError("too many adapters are being downloaded", retry_after=5)
        try:
            hub_id, _, revision = spec.partition("@")
            folder = hub.download(hub_id, revision, most=self._most)
            stored = replace(read_stored(hub_id, 0, folder, None), commit=folder.name)
        finally:
            self._waiting.release()
        with self._lock:
            self._found.pop(spec, None)
            self._found[spec] = time.monotonic(), stored
            while len(self._found) > NAMES:
                self._found.pop(next(iter(self._found)))
        return stored

    def _remembered(self, spec: str) -> Stored | None:
        with self._lock:
            then, stored = self._found.get(spec, (0.0, None))
        if stored is None or time.monotonic() - then > REFRESH:
            return None
        try:
            return stored if stamp(stored.path) == stored.stamp else None
        except AdapterError:  # the cache was emptied
            return None
