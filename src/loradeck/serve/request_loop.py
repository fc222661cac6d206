"""The thread of an engine: takes requests in, computes step after step, and ends requests."""

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from threading import Event, Thread
from typing import Generic, Protocol, TypeVar

from loradeck.errors import ConfigError, Interruption, LoradeckError, RequestError, RequestTimeoutError
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


class Background(Protocol):
    """What the thread does beside its requests."""

    def work(self, serve: Callable[[], bool]) -> bool:
        """Do a piece of work, with a call of `serve` now and then; return False if there was nothing to do.

        `serve` takes requests in and computes one step of them; it returns False if there was nothing to compute. It
        raises Interruption if the thread is to end; that may leave this method, as any exception may.
        """
        ...

    def end(self) -> None:
        """End the work for good. `work` is not called again."""
        ...


AnyAnswer = TypeVar("AnyAnswer", bound=Answer)
AnyStats = TypeVar("AnyStats", bound=Stats)
Arrival = tuple[AnyAnswer, Mapping[str, Stored]]  # the answer to a request, and its adapters on disk by content hash


class RequestLoop(ABC, Generic[AnyAnswer, AnyStats]):
    """Computes the requests that are added, until it is stopped. What a step is, its kinds say."""

    def __init__(
        self, scheduler: Scheduler, adapter_cache: AdapterCache, stats: AnyStats, observer: Observer | None
    ) -> None:
        self._scheduler, self._adapter_cache = scheduler, adapter_cache
        self.stats = stats
        self._observer = observer
        self.failed = False
        self._answers: dict[Request, AnyAnswer] = {}
        self._arriving: deque[Sequence[Arrival[AnyAnswer]]] = deque()
        self._stopped = False
        self._background: Background | None = None
        self._error: Exception | None = None  # of a step within the background's work
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

    def attach(self, background: Background) -> None:
        """Let the thread do a background's work too, in turns with its requests.

        Raises:
            ConfigError: it has a background.
        """
        if self._background is not None:
            raise ConfigError("the engine has a background", hint="Detach that first.")
        self._background = background
        if self.failed:  # perhaps just now, too late for the thread to see this one
            self._end_work()
        self.wake()

    def detach(self, background: Background) -> None:
        """Give the thread no more of a background's work, once it has done what it is doing."""
        if self._background is background:
            self._background = None

    def add(self, arrivals: Sequence[Arrival[AnyAnswer]]) -> None:
        """Add requests. No step is computed between them."""
        self._arriving.append(arrivals)
        if self.failed:  # perhaps just now, too late for the thread to see this one
            self._end_all()
        self.wake()

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._scheduler.waiting) + sum(map(len, self._arriving.copy()))

    @property
    def live(self) -> list[AnyAnswer]:
        """The answers to requests that have not ended."""
        return [
            *self._answers.copy().values(),
            *(answer for arrivals in self._arriving.copy() for answer, _ in arrivals),
        ]

    # ---- in the thread

    @abstractmethod
    def _step(self) -> bool:
        """Compute one step; False if there is nothing to compute."""

    def _clear(self) -> None:
        """Free what requests have left; called once, at the end."""

    def _run(self) -> None:
        try:
            while not self._stopped:
                computed = self._advance()
                if not (self._work() or computed):
                    self._changed.wait(TICK if self._answers else None)
                    self._changed.clear()  # before the next check, so that no later wake-up is lost
        except Exception:
            log.exception("the engine failed")
            self.failed = True
        finally:
            self._end_all()
            self._clear()
            self._end_work()

    def _advance(self) -> bool:
        """Take requests in and compute one step; False if there is nothing to compute."""
        self._receive()
        return self._step()

    def _work(self) -> bool:
        """Let the background work; False if it has nothing to do. Its failure is its own."""
        if self._background is None:
            return False
        worked = True
        try:
            worked = self._background.work(self._serve)
        except Interruption:
            pass
        except Exception:
            log.exception("what the engine does beside its requests failed, and has ended")
            self._end_work()
        if self._error is not None:
            raise self._error
        return worked

    def _serve(self) -> bool:
        """Compute one step within the background's work; False if there is nothing to compute."""
        if self._stopped or self._error is not None:
            raise Interruption
        if not (self._answers or self._arriving):  # asked hundreds of times a second
            return False
        try:
            return self._advance()
        except Exception as error:
            self._error = error
            raise Interruption from error

    def _end_work(self) -> None:
        background, self._background = self._background, None
        if background is not None:
            try:
                background.end()
            except Exception:
                log.exception("what the engine does beside its requests has not ended cleanly")

    def _receive(self) -> None:
        """Take new requests in; end those that are cancelled, late, or whose adapters failed to load."""
        while self._arriving:
            arrivals = self._arriving[0]
            for answer, _ in arrivals:
                self._answers[answer.request] = answer  # before it leaves the queue: `live` must not miss it
            self._arriving.popleft()
            for answer, adapters in arrivals:
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
