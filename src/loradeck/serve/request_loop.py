"""The thread of an engine: takes requests in, computes step after step, and ends requests."""

import logging
import time
from collections import deque
from collections.abc import Mapping
from threading import Event, Thread
from typing import Generic, Protocol, TypeVar

from loradeck.errors import LoradeckError, RequestError, RequestTimeoutError
from loradeck.runner.request import Finish, Request
from loradeck.serve.adapter_cache import AdapterCache
from loradeck.serve.scheduler import Scheduler
from loradeck.serve.stats import Observer, Stats
from loradeck.stored import Stored

TICK = 0.1  # seconds between looks at waiting requests, for patience and time-outs

log = logging.getLogger(__name__)


class Answer(Protocol):
    """What whoever submitted a request gets."""

    request: Request

    def end(self, finish: Finish, error: LoradeckError | None = None) -> None:
        """Declare the end of the request; with an error, that it failed. Only the first call counts."""
        ...

    def cancel(self) -> None:
        """Give the request up."""
        ...


AnyAnswer = TypeVar("AnyAnswer", bound=Answer)
AnyStats = TypeVar("AnyStats", bound=Stats)


class RequestLoop(Generic[AnyAnswer, AnyStats]):
    """Computes the requests that are added, until it is stopped. What a step is, its kinds say."""

    def __init__(
        self, scheduler: Scheduler, adapter_cache: AdapterCache, stats: AnyStats, observer: Observer | None
    ) -> None:
        self._scheduler, self._adapter_cache = scheduler, adapter_cache
        self.stats = stats
        self._observer = observer
        self.failed = False
        self._answers: dict[Request, AnyAnswer] = {}
        self._arriving: deque[tuple[AnyAnswer, Mapping[str, Stored]]] = deque()
        self._stopped = False
        self._changed = Event()
        self._thread = Thread(target=self._run, name="loradeck-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel all requests and wait for the thread to end."""
        self._stopped = True
        self.wake()
        self._thread.join()

    def wake(self) -> None:
        """Tell the thread that there may be something to do."""
        self._changed.set()

    def add(self, answer: AnyAnswer, adapters: Mapping[str, Stored]) -> None:
        """Add a request with its adapters on disk, by content hash."""
        self._arriving.append((answer, adapters))
        if self.failed:  # perhaps just now, too late for the thread to see this one
            self._end_all()
        self.wake()

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._scheduler.waiting) + len(self._arriving)

    @property
    def live(self) -> list[AnyAnswer]:
        """The answers to requests that have not ended."""
        return [*self._answers.copy().values(), *(answer for answer, _ in self._arriving.copy())]

    # ---- in the thread

    def _step(self) -> bool:
        """Compute one step; False if there is nothing to compute."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Free what requests have left; called once, at the end."""

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._receive()
                if not self._step():
                    self._changed.wait(TICK if self._answers else None)
                    self._changed.clear()  # before the next check, so that no later wake-up is lost
        except Exception:
            log.exception("the engine failed")
            self.failed = True
        finally:
            self._end_all()
            self._clear()

    def _receive(self) -> None:
        """Take new requests in; end those that are cancelled, late, or whose adapters failed to load."""
        while self._arriving:
            answer, adapters = self._arriving[0]
            self._answers[answer.request] = answer  # before it leaves the queue: `live` must not miss it
            self._arriving.popleft()
            self._scheduler.add(answer.request, adapters)
        failures = self._adapter_cache.failures()
        now = time.monotonic()
        timeout = self._scheduler.config.timeout
        for answer in [*self._answers.values()]:
            request = answer.request
            if request.cancelled:
                self._end(answer, "cancelled")
            elif now - request.arrived > timeout:
                self._end(answer, "failed", RequestTimeoutError(f"not done within {timeout:g} s"))
            elif errors := [failures[sha256] for sha256, _ in request.key if sha256 in failures]:
                self._end(answer, "failed", errors[0])

    def _end(self, answer: AnyAnswer, finish: Finish, error: LoradeckError | None = None) -> None:
        request = answer.request
        self._scheduler.end(request)
        del self._answers[request]
        self.stats.count_end()
        if self._observer:
            self._observer.finished(request, finish)
        answer.end(finish, error)

    def _end_all(self) -> None:
        for answer in self.live:
            if self.failed:
                answer.end("failed", RequestError("the engine failed"))
            else:
                answer.end("cancelled")
        self._answers.clear()
        self._arriving.clear()
