"""Which adapters are where: on disk, in memory, on the device. Loads them in threads of its own, evicts by last use.

An adapter is known by the sha256 of its content, so a new version of a name is another adapter, and requests on the old
one are not concerned. Knows a store and a bank; knows no requests.
"""

import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from threading import RLock

import torch

from loradeck.errors import AdapterError, BusyError, ConfigError, LoradeckError, UnknownAdapterError
from loradeck.lora.bank import Bank
from loradeck.lora.routing import RouteEntry, weights_of
from loradeck.serve import threads
from loradeck.serve.config import EngineConfig
from loradeck.serve.request import Key
from loradeck.serve.resident import Resident, Tier
from loradeck.store import AdapterStore
from loradeck.stored import Stored


class AdapterCache:
    """The adapters of one engine. Any thread may call it."""

    def __init__(self, bank: Bank, store: AdapterStore | None, config: EngineConfig, wake: Callable[[], None]) -> None:
        """`wake` is called when a load has ended."""
        self.bank = bank
        self.store = store
        self.budget = config.adapter_bytes
        on_device = next(bank.model.parameters()).device.type != "cpu"
        self.memory_budget = config.memory_bytes if on_device else 0  # else both tiers are the same memory
        # float32 says no more where its update is added to bfloat16, and takes twice the bytes, at each step too.
        # bfloat16 has float32's range; in float16 a weight might be Inf.
        self._dtype = torch.bfloat16 if bank.model.dtype == torch.bfloat16 else None
        self.loads = 0
        self.evictions = 0
        self.load_seconds = 0.0
        self._wake = wake
        self._lock = RLock()
        self._known: dict[str, Resident] = {}
        self._failed: dict[str, LoradeckError] = {}
        self._closed = False
        self._loaders = ThreadPoolExecutor(config.loaders, "loradeck-load", threads.alone)

    # ---- what is where

    def residents(self) -> list[Resident]:
        """Return the adapters on the device and in memory."""
        with self._lock:
            return [own for own in self._known.values() if own.loading is None]

    def tier(self, sha256: str) -> Tier:
        """Return where an adapter is; what is not known here is on disk."""
        with self._lock:
            own = self._known.get(sha256)
            return "disk" if own is None or own.loading is not None else own.tier

    @property
    def nbytes(self) -> int:
        """Bytes on the device, those that are being loaded included."""
        with self._lock:
            return sum(own.nbytes for own in self._known.values() if own.tier == "device")

    def resolve(self, entry: RouteEntry) -> tuple[Key, dict[str, Stored]]:
        """Return what a route's entry means now: names, or name@version, become contents. Asks the disk.

        Raises:
            RouteError: it is no entry.
            UnknownAdapterError: the store has no such adapter, or there is no store.
            AdapterError: an adapter cannot be used.
            ConfigError: they take more bytes than there are for adapters.
        """
        weights: dict[str, float] = {}
        found: dict[str, Stored] = {}
        for spec, weight in weights_of(entry):
            stored = self._find(spec)
            sha256 = stored.sha256()
            found[sha256] = stored
            weights[sha256] = weights.get(sha256, 0.0) + weight
        nbytes = sum(stored.facts.nbytes for stored in found.values())
        if nbytes > self.budget:
            raise ConfigError(
                f"{' and '.join(stored.spec for stored in found.values())} take {nbytes} bytes, and there are "
                f"{self.budget} for adapters",
                hint="Raise adapter_bytes.",
            )
        return tuple(sorted((sha256, weight) for sha256, weight in weights.items() if weight)), found

    # ---- for requests

    def ready(self, key: Key) -> bool:
        """Say whether all of a key's adapters are on the device."""
        with self._lock:
            return all(sha256 in self._known and self._known[sha256].ready for sha256, _ in key)

    def fetch(self, found: Collection[tuple[str, Stored]], *, spare: Callable[[str], bool]) -> bool:
        """Begin to load those of these adapters that are not on the device, and say whether there is room for them.

        Adapters that nobody uses give way, the least recently used first, but for those that `spare` names.
        """
        with self._lock:
            missing = [(sha256, stored) for sha256, stored in found if not self._is_coming(sha256)]
            if not missing:
                return True
            wanted = {sha256 for sha256, _ in found}
            needed = sum(stored.facts.nbytes for _, stored in missing) - (self.budget - self.nbytes)
            leaving = []
            for own in sorted(self._known.values(), key=lambda own: own.last_used):
                if needed <= 0:
                    break
                if own.idle and own.sha256 not in wanted and not spare(own.sha256):
                    leaving.append(own)
                    needed -= own.nbytes
            if needed > 0:
                return False
            for own in leaving:
                self._evict(own, coming=wanted)
            for sha256, stored in missing:
                self._begin(sha256, stored)
            return True

    def failures(self) -> dict[str, LoradeckError]:
        """Return why adapters could not be loaded, once; they are tried again for the next that asks."""
        with self._lock:
            failed = self._failed.copy()
            self._failed.clear()
            return failed

    def pin(self, key: Key) -> bool:
        """Keep a key's adapters on the device until they are unpinned as often, if all are there, and say so."""
        with self._lock:
            if not self.ready(key):
                return False
            for sha256, _ in key:
                self._known[sha256].pins += 1
                self._known[sha256].last_used = time.time()
            return True

    def unpin(self, key: Key) -> None:
        """Let a key's adapters go, as far as this pin is concerned."""
        with self._lock:
            for sha256, _ in key:
                own = self._known[sha256]
                own.pins -= 1
                own.last_used = time.time()
                if own.doomed and own.idle:
                    self._drop(own)

    # ---- by hand

    def load(self, spec: str) -> None:
        """Make an adapter resident, and wait until it is.

        Raises:
            UnknownAdapterError, AdapterError, ConfigError: as `resolve`; AdapterError also where all adapters on the
                device are in use and leave no room.
            BusyError: the engine is about to end.
        """
        _, found = self.resolve(spec)
        with self._lock:
            if self._closed:
                raise _ending()
            for sha256 in found:
                if sha256 in self._known:
                    self._known[sha256].doomed = False
            if not self.fetch([*found.items()], spare=lambda _: False):
                raise AdapterError(f"there is no room for {spec} while others are in use", hint="Raise adapter_bytes.")
            loading = [self._known[sha256].loading for sha256 in found]
        try:
            errors = [future.result() for future in loading if future is not None]
        except CancelledError:
            raise _ending() from None
        for error in filter(None, errors):
            raise error

    def unload(self, name: str) -> None:
        """Give back the memory of an adapter, in all versions, once no running request uses it."""
        latest = ""  # it may have been loaded by another name
        with suppress(LoradeckError):
            latest = self._find(name).sha256()
        with self._lock:
            for own in [own for own in self._known.values() if own.stored.name == name or own.sha256 == latest]:
                own.doomed = True
                if own.tier == "memory":
                    self._known.pop(own.sha256)
                elif own.idle:
                    self._drop(own)

    def close(self) -> None:
        """Stop loading, and keep nothing."""
        with self._lock:
            self._closed = True
        self._loaders.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._known.clear()

    # ---- moving

    def _find(self, spec: str) -> Stored:
        if self.store is None:
            raise UnknownAdapterError(f"no adapter is named {spec!r}", hint="Give the engine a store of adapters.")
        return self.store.find(spec)

    def _is_coming(self, sha256: str) -> bool:
        own = self._known.get(sha256)
        return own is not None and own.tier == "device"

    def _begin(self, sha256: str, stored: Stored) -> None:
        own = self._known.setdefault(sha256, Resident(stored, sha256, "device", time.time()))
        own.stored, own.tier, own.doomed = stored, "device", False
        self._failed.pop(sha256, None)  # it is no news any more
        own.loading = self._loaders.submit(self._load, own)

    def _load(self, own: Resident) -> LoradeckError | None:
        begun = time.perf_counter()
        failure: LoradeckError | None = None
        try:
            if own.parked is not None:
                self.bank.add(own.sha256, own.parked)
                own.parked = None
            else:
                self.bank.load(own.stored.path, own.sha256)
                if own.stored.sha256() != own.sha256:  # asked after the load, it vouches for what was loaded
                    raise AdapterError(f"{own.spec} has changed while it was loaded", hint="Ask again.")
                own.loaded_bytes = self.bank[own.sha256].to(self._dtype).nbytes
        except Exception as error:
            failure = _told(own, error)
            with self._lock:
                if own.sha256 in self.bank:
                    self.bank.unload(own.sha256)
                self._known.pop(own.sha256)
                self._failed[own.sha256] = failure
        else:
            with self._lock:
                self.loads += 1
                self.load_seconds += time.perf_counter() - begun
                own.loading = None
                if own.doomed:
                    self._drop(own)
        self._wake()
        return failure

    def _evict(self, own: Resident, *, coming: Collection[str]) -> None:
        """Take an adapter off the device; it stays in memory if there is room beside those that are not `coming`."""
        self.evictions += 1
        adapter = self.bank[own.sha256]
        self._drop(own)
        if own.nbytes > self.memory_budget:
            return
        own.parked = adapter.to("cpu")
        own.tier = "memory"
        self._known[own.sha256] = own
        self._trim(other for other in self._known.values() if other.tier == "memory" and other.sha256 not in coming)

    def _trim(self, parked: Iterable[Resident]) -> None:
        there = sorted(parked, key=lambda own: own.last_used)
        excess = sum(own.nbytes for own in there) - self.memory_budget
        for own in there:
            if excess <= 0:
                return
            excess -= own.nbytes
            self._known.pop(own.sha256)

    def _drop(self, own: Resident) -> None:
        self.bank.unload(own.sha256)
        self._known.pop(own.sha256)
        own.doomed = False


def _ending() -> BusyError:
    return BusyError("the engine is about to end", retry_after=1)


def _told(own: Resident, error: Exception) -> LoradeckError:
    if isinstance(error, LoradeckError):
        return error
    return AdapterError(f"{own.spec} could not be loaded: {error}", hint="Ask again; if it goes on, publish it anew.")
