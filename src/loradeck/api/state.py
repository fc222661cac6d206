"""What a server's routes share: the engine, the API keys, and the requests in progress."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from weakref import WeakValueDictionary

from starlette.requests import Request as HttpRequest

from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.catalogue import Catalogue
from loradeck.api.config import ServerConfig
from loradeck.api.errors import HttpError
from loradeck.api.model_name import AdapterIds, ModelNames
from loradeck.live.records import job_of

if TYPE_CHECKING:
    from loradeck.api.metrics import Metrics
    from loradeck.live.live_training import LiveTraining
    from loradeck.runner.request import Request
    from loradeck.serve.engine import Engine
    from loradeck.serve.generation import Generation
    from loradeck.serve.pooling_engine import PoolingEngine
    from loradeck.serve.pooling_result import PoolingResult


@dataclass(eq=False)
class ServerState:
    """The state of one server."""

    engine: "Engine | PoolingEngine"
    metrics: "Metrics"
    keys: ApiKeys = field(default_factory=ApiKeys)
    config: ServerConfig = field(default_factory=ServerConfig)
    training: "LiveTraining | None" = None
    """What trains adapters between the engine's steps."""
    adapter_ids: AdapterIds = field(init=False)
    names: ModelNames = field(init=False)
    catalogue: Catalogue = field(init=False)
    live: "set[Generation | PoolingResult]" = field(init=False, default_factory=set)
    """Answers that a client waits for."""
    draining: bool = field(init=False, default=False)
    unanswered: int = field(init=False, default=0)
    """Requests whose response has not begun."""
    comparing: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    """Held while the weights of adapters are read to be compared or combined, so that one request at a time does it."""
    started: int = field(init=False, default_factory=lambda: int(time.time()))
    """Seconds since 1970."""
    _reading: set[asyncio.Timeout] = field(init=False, default_factory=set)
    _locks: "WeakValueDictionary[str, asyncio.Lock]" = field(init=False, default_factory=WeakValueDictionary)

    def __post_init__(self) -> None:
        self.adapter_ids = AdapterIds(self.engine.store)
        self.names = ModelNames(self.engine.base, self.adapter_ids)
        self.catalogue = Catalogue(self.engine.adapter_cache)
        self.metrics.watch(self.engine, self._live_requests, self.training)

    @property
    def shutting_down(self) -> bool:
        """Whether the server takes no more requests."""
        return self.draining or self.engine.failed

    @property
    def generator(self) -> "Engine":
        """The engine, in a route that only bases have that generate."""
        return cast("Engine", self.engine)

    @property
    def pooler(self) -> "PoolingEngine":
        """The engine, in a route that only bases have that do not generate."""
        return cast("PoolingEngine", self.engine)

    @property
    def store_path(self) -> str:
        """The path of the adapters' folder, or its URL; "" if there is none."""
        return self.engine.store.location if self.engine.store else ""

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`; identifies the base's weights."""
        return f"fp_{self.engine.base.fingerprint[:10]}"

    def check_adapters(self, key: ApiKey, names: Iterable[str]) -> None:
        """Check that a key may use these adapters, whether or not they exist. Reads the disk for checkpoints.

        Raises:
            HttpError: 403.
            UnknownJobError: the checkpoint of another key's job.
        """
        for name in names:
            job = job_of(name)
            if job and self.training:
                self.training.jobs.get(job, key.name)
            else:
                key.check_adapters([name])

    def lock(self, name: str) -> asyncio.Lock:
        """Return the lock of those who load an adapter under this name."""
        return self._locks.setdefault(name, asyncio.Lock())

    def release(self, generations: "Iterable[Generation | PoolingResult]") -> None:
        """Cancel those that have not finished, and forget them all."""
        for generation in generations:
            generation.cancel()
            self.live.discard(generation)

    @asynccontextmanager
    async def reading_body(self) -> AsyncIterator[None]:
        """Read a part of a request's body, unless the server shuts down before it arrives.

        Raises:
            TimeoutError: the server shuts down.
        """
        async with asyncio.timeout(0 if self.draining else None) as timeout:
            self._reading.add(timeout)
            try:
                yield
            finally:
                self._reading.discard(timeout)

    def stop_reading(self) -> None:
        """Take no more requests, not even those that are arriving. To be called in the event loop."""
        self.draining = True
        self.catalogue.close()
        for timeout in self._reading:
            timeout.reschedule(0)

    def drain(self, seconds: float) -> None:
        """Take no more requests, give the running ones this long to finish, and cancel the rest."""
        self.draining = True
        if self.training:
            self.training.close()
        self.engine.drain(seconds)

    def _live_requests(self) -> "list[Request]":
        return [generation.request for generation in tuple(self.live) if generation.finish is None]


def state_of(request: HttpRequest) -> ServerState:
    """Return the state of the server that received a request."""
    state: ServerState = request.app.state.server
    return state


def training_of(request: HttpRequest) -> "LiveTraining":
    """Return what trains adapters, for a key that may train.

    Raises:
        HttpError: 404, the server does not train; 403, the key may not.
    """
    training = state_of(request).training
    if training is None:
        raise HttpError(404, "This server does not train; its flag --train lets it.")
    request.state.key.check_train()
    return training
