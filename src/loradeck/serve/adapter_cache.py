"""The adapters of an engine: which are on the device, in memory or on disk. Loads in background threads, evicts by LRU.

Adapters are known by the sha256 of their content, so a new version under the same name is another adapter, and
requests for the old one are unaffected.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Literal, Protocol, TypeAlias

import torch

from loradeck.base import openmp
from loradeck.errors import AdapterError, BusyError, ConfigError, LoradeckError, UnknownAdapterError
from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.lora.compatibility import check_fingerprint, why_not_a_copy
from loradeck.lora.routing import RouteEntry, weights_of
from loradeck.lora.vocabulary import tokens_added_by
from loradeck.runner.request import Key
from loradeck.serve.config import EngineConfig
from loradeck.serve.hub_adapters import HubAdapters
from loradeck.store import AdapterStore
from loradeck.stored import Stored

Tier: TypeAlias = Literal["device", "memory", "disk"]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Resident:
    """An adapter on the device or in memory, or on its way there."""

    stored: Stored
    """The version by which it was last loaded."""
    sha256: str
    nbytes: int
    """Bytes of its tensors in memory; not always what they take on disk."""
    tier: Tier
    last_used: float
    """In seconds since 1970."""
    pins: int = 0
    """Running requests that use it."""
    evict_when_idle: bool = False
    host_copy: Adapter | None = None
    """Its tensors, in the tier memory."""
    loading: Future[LoradeckError | None] | None = None

    @property
    def spec(self) -> str:
        return self.stored.spec

    @property
    def pinned(self) -> bool:
        return self.pins > 0

    @property
    def ready(self) -> bool:
        """Whether it can be used."""
        return self.tier == "device" and self.loading is None

    @property
    def idle(self) -> bool:
        """Whether it can leave the device."""
        return self.ready and not self.pins

    @property
    def log_fields(self) -> dict[str, object]:
        return {"adapter": self.spec, "sha256": self.sha256, "bytes": self.nbytes}


class AdapterSource(Protocol):
    """Adapters that requests may name besides those of the store. Any thread may call it."""

    def has(self, spec: str) -> bool:
        """Return whether a name is one of this source's, whether there is such an adapter or not."""
        ...

    def find(self, spec: str) -> Stored:
        """Return the adapter of a name that it `has`. May read the disk.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterError: it is unusable.
            BusyError: too many requests wait for it.
        """
        ...


class AdapterCache:
    """The adapters of one engine. Any thread may call it."""

    def __init__(
        self,
        bank: Bank,
        store: AdapterStore | None,
        config: EngineConfig,
        wake: Callable[[], None],
        prepare: Callable[[Adapter], None] = lambda _: None,
    ) -> None:
        """`prepare` is called with each new adapter, in the loader's thread before others see it; `wake` after each."""
        self.bank = bank
        self.store = store
        self.hub = HubAdapters(config.hub, config.hub_bytes)
        self.sources: list[AdapterSource] = [self.hub]
        """Where a name is looked up, in this order, before the store."""
        self.budget = config.adapter_bytes
        on_device = next(bank.model.parameters()).device.type != "cpu"
        self.memory_budget = config.memory_bytes if on_device else 0  # on a CPU both tiers are the same memory
        # On a bfloat16 base, float32 adapters gain little precision and double the bytes read at each step. bfloat16
        # has float32's range; in float16 a weight might overflow.
        self._dtype = torch.bfloat16 if bank.model.dtype == torch.bfloat16 else None
        self.loads = 0
        self.load_failures = 0
        self.evictions = 0
        self.load_seconds = 0.0
        self._wake, self._prepare = wake, prepare
        self._lock = RLock()
        self._residents: dict[str, Resident] = {}
        self._failures: dict[str, LoradeckError] = {}
        self._added_tokens: dict[str, int] = {}
        self._closed = False
        self._loaders = ThreadPoolExecutor(config.loaders, "loradeck-load", openmp.alone)

    # ---- state

    def residents(self) -> list[Resident]:
        """Return the adapters on the device and in memory."""
        with self._lock:
            return [resident for resident in self._residents.values() if resident.loading is None]

    def tier(self, sha256: str) -> Tier:
        """Return where an adapter is."""
        with self._lock:
            resident = self._residents.get(sha256)
            return "disk" if resident is None or resident.loading is not None else resident.tier

    @property
    def nbytes(self) -> int:
        """Bytes on the device, including adapters that are being loaded."""
        with self._lock:
            return sum(resident.nbytes for resident in self._residents.values() if resident.tier == "device")

    def size(self, stored: Stored) -> int:
        """Return the bytes that an adapter takes once it is loaded."""
        facts = stored.facts
        return facts.parameter_bytes if self._dtype is None else facts.parameters * self._dtype.itemsize

    def added_tokens(self, stored: Stored) -> int:
        """Return how many tokens beyond the base's an adapter has; of one that does not fit, none. Reads the disk."""
        if not stored.facts.has_weights:
            return 0
        sha256 = stored.sha256()
        if sha256 not in self._added_tokens:
            try:
                count = tokens_added_by(self.bank.vocabulary, self.bank.check(stored.path))
            except LoradeckError:  # loading it says why
                return 0
            self._added_tokens[sha256] = count
        return self._added_tokens[sha256]

    def resolve(self, entry: RouteEntry) -> tuple[Key, dict[str, Stored]]:
        """Return the key of a route's entry as of now, and its adapters on disk by content hash. Reads the disk.

        Raises:
            RouteError: invalid entry.
            UnknownAdapterError: the store has no such adapter, or there is no store.
            AdapterError: an adapter cannot be used.
            ConfigError: together, the adapters are larger than the budget.
        """
        weights: dict[str, float] = {}
        adapters: dict[str, Stored] = {}
        for spec, weight in weights_of(entry):
            stored = self.find(spec)
            sha256 = stored.sha256()
            adapters[sha256] = stored
            weights[sha256] = weights.get(sha256, 0.0) + weight
        self._check_size(adapters.values())
        return tuple(sorted((sha256, weight) for sha256, weight in weights.items() if weight)), adapters

    # ---- for requests

    def ready(self, key: Key) -> bool:
        """Return whether all adapters of a key are on the device."""
        with self._lock:
            return all(sha256 in self._residents and self._residents[sha256].ready for sha256, _ in key)

    def fetch(self, adapters: Mapping[str, Stored], *, keep: Callable[[str], bool]) -> bool:
        """Start to load the adapters that are not on the device; False if there is no room for them.

        To make room, idle adapters are evicted, the least recently used first, except those that `keep` names.
        """
        with self._lock:
            missing = {sha256: stored for sha256, stored in adapters.items() if not self._on_device(sha256)}
            if not missing:
                return True
            excess = sum(map(self.size, missing.values())) - (self.budget - self.nbytes)
            evicted = []
            for resident in sorted(self._residents.values(), key=lambda resident: resident.last_used):
                if excess <= 0:
                    break
                if resident.idle and resident.sha256 not in adapters and not keep(resident.sha256):
                    evicted.append(resident)
                    excess -= resident.nbytes
            if excess > 0:
                return False
            for resident in evicted:
                self._evict(resident, wanted=adapters)
            for sha256, stored in missing.items():
                self._start_load(sha256, stored)
            return True

    def failures(self) -> dict[str, LoradeckError]:
        """Return the errors of failed loads, each once. The next request for such an adapter tries again."""
        with self._lock:
            failures = self._failures.copy()
            self._failures.clear()
            return failures

    def pin(self, key: Key) -> bool:
        """Keep a key's adapters on the device until `unpin`; False if they are not all there."""
        with self._lock:
            if not self.ready(key):
                return False
            for sha256, _ in key:
                self._residents[sha256].pins += 1
                self._residents[sha256].last_used = time.time()
            return True

    def unpin(self, key: Key) -> None:
        """Undo one `pin`."""
        with self._lock:
            for sha256, _ in key:
                resident = self._residents[sha256]
                resident.pins -= 1
                resident.last_used = time.time()
                if resident.evict_when_idle and resident.idle:
                    self._drop(resident)

    # ---- by hand

    def check(self, stored: Stored) -> None:
        """Check that an adapter fits the base and the budget. Its values are read, in a loader's thread, but not kept.

        Raises:
            AdapterError, ConfigError, BusyError: as `load`.
        """
        self._check_size([stored])
        if not stored.is_here:  # its files are checked when a request needs them
            facts, name = stored.facts, f"{stored.spec}"
            base = facts.base_model, facts.base_fingerprint, facts.base_quantisation
            check_fingerprint(self.bank.model, name, *base, any_base=False)
            return
        files = self.bank.check(stored.path)
        if stored.recorded_sha256 and not files.copies:
            return  # publishing has read its values
        check_copy = partial(why_not_a_copy, self.bank.model)
        try:
            self._loaders.submit(Adapter.from_files, files, check_copy=check_copy).result()
        except LoradeckError:
            raise
        except (Exception, CancelledError) as error:
            raise _shutting_down() if self._closed else _unexpected(stored, error) from error

    def load(self, adapter: str | Stored) -> None:
        """Load an adapter onto the device and wait for it.

        Raises:
            UnknownAdapterError, AdapterError, ConfigError: as `resolve`; AdapterError also if the adapters in use
                leave no room.
            BusyError: the engine is shutting down.
        """
        stored = self.find(adapter) if isinstance(adapter, str) else adapter
        sha256 = stored.sha256()
        self._check_size([stored])
        with self._lock:
            if self._closed:
                raise _shutting_down()
            if not self.fetch({sha256: stored}, keep=lambda _: False):
                raise AdapterError(f"no room for {stored.spec} while others are in use", hint="Raise adapter_bytes.")
            resident = self._residents[sha256]
            resident.evict_when_idle = False
            loading = resident.loading
            if loading is None:
                resident.stored = stored  # it may have been loaded under another name
        try:
            error = None if loading is None else loading.result()
        except CancelledError:
            raise _shutting_down() from None
        if error is not None:
            raise error

    def unload(self, name: str) -> bool:
        """Free the memory of all versions of an adapter, as soon as no running request uses them.

        Return whether there was anything to free; the files may be gone.
        """
        latest = ""  # it may have been loaded under another name
        with suppress(LoradeckError):
            latest = self.find(name).sha256()
        return self._unload(lambda resident: resident.stored.name == name or resident.sha256 == latest)

    def discard(self, sha256: str) -> None:
        """Free the memory of one adapter, as soon as no running request uses it."""
        self._unload(lambda resident: resident.sha256 == sha256)

    def _unload(self, condition: Callable[[Resident], bool]) -> bool:
        with self._lock:
            residents = [resident for resident in self._residents.values() if condition(resident)]
            for resident in residents:
                resident.evict_when_idle = True
                if resident.tier == "memory" or resident.idle:
                    self._drop(resident)
        return bool(residents)

    def close(self) -> None:
        """Stop loading and free all memory."""
        with self._lock:
            self._closed = True
        self._loaders.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._residents.clear()

    # ---- moving

    def find(self, spec: str) -> Stored:
        """Return the adapter that a name now refers to: one of the sources, or of the store.

        Raises:
            UnknownAdapterError: there is no such adapter, or no store.
            AdapterError: it is unusable, or its source does not give it.
            BusyError: too many requests wait for its source.
        """
        source = next((source for source in self.sources if source.has(spec)), None)
        if source is not None:
            return source.find(spec)
        if self.store is None:
            raise UnknownAdapterError(f"no adapter is named {spec!r}", hint="Give the engine a store of adapters.")
        return self.store.find(spec)

    def _check_size(self, adapters: Collection[Stored]) -> None:
        nbytes = sum(map(self.size, adapters))
        if nbytes > self.budget:
            specs = " and ".join(stored.spec for stored in adapters)
            raise ConfigError(
                f"{specs} take{'s' * (len(adapters) == 1)} {nbytes} bytes, more than adapter_bytes={self.budget}",
                hint="Raise adapter_bytes.",
            )

    def _on_device(self, sha256: str) -> bool:
        """Return whether an adapter is on the device or on its way there."""
        resident = self._residents.get(sha256)
        return resident is not None and resident.tier == "device"

    def _start_load(self, sha256: str, stored: Stored) -> None:
        resident = Resident(stored, sha256, self.size(stored), "device", time.time())
        resident = self._residents.setdefault(sha256, resident)
        resident.stored, resident.tier, resident.evict_when_idle = stored, "device", False
        self._failures.pop(sha256, None)  # out of date now
        resident.loading = self._loaders.submit(self._load, resident)

    def _load(self, resident: Resident) -> LoradeckError | None:
        started = time.perf_counter()
        failure: LoradeckError | None = None
        sha256 = resident.sha256
        try:
            if resident.host_copy is not None:
                self.bank.add(sha256, resident.host_copy)
                resident.host_copy = None
            else:
                self.bank.load(resident.stored.path, sha256)
                if resident.stored.sha256() != sha256:  # read again, so the hash is that of what was loaded
                    raise AdapterError(f"{resident.spec} changed while it was loaded", hint="Try again.")
                self.bank[sha256].to(self._dtype)
            resident.nbytes = self.bank[sha256].nbytes  # headers do not say which weights equal the base's
            self._prepare(self.bank[sha256])
        except Exception as error:
            failure = _load_error(resident, error)
            with self._lock:
                self.load_failures += 1
                if sha256 in self.bank:
                    self.bank.unload(sha256)
                self._residents.pop(sha256)
                self._failures[sha256] = failure
        else:
            seconds = time.perf_counter() - started
            with self._lock:
                self.loads += 1
                self.load_seconds += seconds
                resident.loading = None
                if resident.evict_when_idle:
                    self._drop(resident)
            fields = {**resident.log_fields, "seconds": seconds}
            log.info("loaded %(adapter)s in %(seconds).3f s: %(bytes)d bytes", fields)
        self._wake()
        return failure

    def _evict(self, resident: Resident, *, wanted: Collection[str]) -> None:
        """Take an adapter off the device. It stays in memory if there is room beside those that are not `wanted`."""
        self.evictions += 1
        adapter = self.bank[resident.sha256]
        self._drop(resident, "evicted")
        if resident.nbytes > self.memory_budget:
            return
        resident.host_copy = adapter.to("cpu")
        resident.tier = "memory"
        self._residents[resident.sha256] = resident
        self._trim(other for other in self._residents.values() if other.tier == "memory" and other.sha256 not in wanted)

    def _trim(self, in_memory: Iterable[Resident]) -> None:
        residents = sorted(in_memory, key=lambda resident: resident.last_used)
        excess = sum(resident.nbytes for resident in residents) - self.memory_budget
        for resident in residents:
            if excess <= 0:
                return
            excess -= resident.nbytes
            self._residents.pop(resident.sha256)

    def _drop(self, resident: Resident, event: str = "unloaded") -> None:
        if resident.tier == "device":
            self.bank.unload(resident.sha256)
        self._residents.pop(resident.sha256)
        resident.evict_when_idle = False
        log.info(f"{event} %(adapter)s: %(bytes)d bytes", resident.log_fields)


def _shutting_down() -> BusyError:
    return BusyError("the engine is shutting down", retry_after=1)


def _load_error(resident: Resident, error: Exception) -> LoradeckError:
    """Log why a load failed, with a traceback if it is unexpected, and return what requests are told."""
    is_bug = not isinstance(error, LoradeckError)
    log.log(
        logging.ERROR if is_bug else logging.WARNING,
        "could not load %(adapter)s: %(error)s",
        {**resident.log_fields, "error": str(error)},
        exc_info=error if is_bug or log.isEnabledFor(logging.DEBUG) else None,
    )
    return _unexpected(resident.stored, error) if is_bug else error


def _unexpected(stored: Stored, error: BaseException) -> AdapterError:
    return AdapterError(
        f"{stored.spec} could not be loaded: {error}", hint="Try again; if it fails again, publish it anew."
    )
