"""Which adapters of a store can be served on a base. What is wrong with the others is logged when it is found."""

import logging
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING

from loradeck.errors import SHOWN, AdapterNameError, BusyError, LoradeckError

if TYPE_CHECKING:
    from loradeck.serve.adapter_cache import AdapterCache
    from loradeck.stored import Stored

log = logging.getLogger(__name__)


class Catalogue:
    """The usable adapters of an engine's store. Thread-safe; every call asks the disk."""

    def __init__(self, adapter_cache: "AdapterCache") -> None:
        self._adapter_cache = adapter_cache
        self._store = adapter_cache.store
        self._lock = Lock()
        self._errors: dict[Stored, LoradeckError | None] = {}
        self._closed = False

    def usable(self) -> "list[Stored]":
        """Return the latest version of each adapter that fits the base, sorted by name; a new one is read once.

        After those of the store come those of the hub that requests have named.

        Raises:
            AdapterError: the store's folder cannot be read.
            BusyError: the server is shutting down.
        """
        with self._lock:
            before = self._errors
            latest = [*(self._store.latest() if self._store else ()), *self._adapter_cache.hub.found()]
            self._errors = {stored: before[stored] if stored in before else self._error(stored) for stored in latest}
            new = {stored: error for stored, error in self._errors.items() if error and stored not in before}
            _warn({stored.spec if stored.commit else stored.path.name: error for stored, error in new.items()})
            return [stored for stored, error in self._errors.items() if error is None]

    def log_problems(self) -> None:
        """Log which adapters cannot be served, and why: unusable names and files, another base."""
        if self._store is None:
            return
        try:
            problems = self._store.problems()
            names = [name for name, error in problems.items() if isinstance(error, AdapterNameError)]
            if names:
                log.warning(
                    "skipped %(count)d folders, because no adapter can have their names: %(folders)s",
                    {"count": len(names), "folders": _listing(sorted(names))},
                )
            _warn({name: error for name, error in problems.items() if name not in names})
            self.usable()
        except BusyError:
            return
        except LoradeckError as error:
            log.warning("%(error)s", {"error": str(error)})

    def close(self) -> None:
        """End checks that are in progress."""
        self._closed = True

    def _error(self, stored: "Stored") -> LoradeckError | None:
        if self._closed:
            raise BusyError("the server is shutting down", retry_after=1)
        try:
            self._adapter_cache.check(stored)
        except BusyError:
            raise
        except LoradeckError as error:
            return error
        return None


def _warn(errors: Mapping[str, LoradeckError]) -> None:
    for adapter, error in [*errors.items()][:SHOWN]:
        log.warning("%(adapter)s cannot be served: %(error)s", {"adapter": adapter, "error": str(error)})
    if len(errors) > SHOWN:
        log.warning("%(count)d more adapters cannot be served", {"count": len(errors) - SHOWN})


def _listing(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
