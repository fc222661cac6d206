"""The engine's thread: it takes requests in, computes step after step, and ends requests. Knows no text.

A step is next -> run -> choose -> accept.
"""

import logging
import time
from collections import deque
from threading import Event, Thread

from loradeck.errors import LoradeckError, RequestError
from loradeck.serve.adapter_cache import AdapterCache
from loradeck.serve.generation import Generation
from loradeck.serve.kv_cache import KVCache
from loradeck.serve.model_runner import ModelRunner
from loradeck.serve.observer import Finish, Observer
from loradeck.serve.request import Request, Scheduled
from loradeck.serve.sampler import Choice, Sampler
from loradeck.serve.scheduler import Scheduler
from loradeck.serve.stats import Stats
from loradeck.stored import Stored

TICK = 0.1  # seconds after which requests that wait are looked at again, for patience and time-outs

log = logging.getLogger(__name__)


class Loop:
    """Computes what was added, until it is stopped."""

    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCache,
        sampler: Sampler,
        scheduler: Scheduler,
        residency: AdapterCache,
        *,
        longest: int,
        observer: Observer | None,
    ) -> None:
        """`longest` is the most tokens of a row."""
        self._runner, self._cache, self._sampler = runner, cache, sampler
        self._scheduler, self._residency = scheduler, residency
        self._longest = longest
        self._observer = observer
        self.stats = Stats(scheduler, cache)
        self.failed = False
        self._generations: dict[Request, Generation] = {}
        self._arriving: deque[tuple[Generation, dict[str, Stored]]] = deque()
        self._stopped = False
        self._changed = Event()
        self._thread = Thread(target=self._run, name="loradeck-engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel what is here, and wait for the thread to end."""
        self._stopped = True
        self.wake()
        self._thread.join()

    def wake(self) -> None:
        """Say that there may be something to do."""
        self._changed.set()

    def add(self, generation: Generation, found: dict[str, Stored]) -> None:
        """Take a request in; `found` are its adapters on disk."""
        self._arriving.append((generation, found))
        if self.failed:  # perhaps just now, too late for the thread to see this one
            self._give_up()
        self.wake()

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._scheduler.waiting) + len(self._arriving)

    @property
    def live(self) -> list[Generation]:
        """The answers to all requests that have not ended."""
        return [*self._generations.copy().values(), *(generation for generation, _ in self._arriving.copy())]

    # ---- in the thread

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._changed.clear()  # before looking: what comes afterwards wakes it
                self._receive()
                if not self._step():
                    self._changed.wait(TICK if self._generations else None)
        except Exception:
            log.exception("the engine has failed")
            self.failed = True
        finally:
            self._give_up()
            self._cache.clear()

    def _give_up(self) -> None:
        finish: Finish = "failed" if self.failed else "cancelled"
        for generation in self.live:
            generation.end(finish, RequestError("the engine has failed") if self.failed else None)
        self._generations.clear()
        self._arriving.clear()

    def _step(self) -> bool:
        """Compute one step, and say whether there was anything to compute."""
        now = time.monotonic()
        batch = self._scheduler.next(now)
        if not batch:
            return False
        if self._observer:
            for work in batch:
                if work.request.admitted == now:
                    self._observer.admitted(work.request)
        try:
            scores = self._runner.run(batch, self._cache)
            choices = self._sampler.choose(scores, batch)
        except Exception as error:
            if len(batch) == 1:
                choices = [Choice.failed(error)]
            else:
                log.warning("a step of %d requests failed, each is computed alone: %s", len(batch), error)
                choices = [self._alone(work) for work in batch]
        for work, choice in zip(batch, choices, strict=True):  # all, before any ends: rows move when one does
            if choice.error is None:
                self._scheduler.done(work)
        for work, choice in zip(batch, choices, strict=True):
            self._accept(work, choice)
        return True

    def _alone(self, work: Scheduled) -> Choice:
        """Compute one request's part of a step that failed, so that only the request that made it fail does."""
        try:
            return self._sampler.choose(self._runner.run([work], self._cache), [work])[0]
        except Exception as error:
            return Choice.failed(error)

    def _accept(self, work: Scheduled, choice: Choice) -> None:
        """Add what was computed to a request, and end it where it ends."""
        request, generation = work.request, self._generations[work.request]
        if choice.error is not None:
            return self._end(generation, "failed", choice.error)
        if choice.prompt:
            before = request.computed - work.count
            at = before + 1 if before else 0
            generation.prompt[at : at + len(choice.prompt)] = choice.prompt
        if request.pending:
            return None  # the prompt goes on
        if not request.generated:
            self._cache.keep(request)
        if choice.token is None:
            return self._end(generation, "length")
        request.tokens.append(choice.token.id)
        now = time.monotonic()
        since = now - (request.last_token or request.arrived)
        request.first_token = request.first_token or now
        request.last_token = now
        if self._observer:
            self._observer.token(request, since)
        try:
            generation.push(choice.token)
        except Exception as error:  # the tokenizer's
            return self._end(generation, "failed", Choice.failed(error).error)
        if choice.token.ends or generation.stopped:
            return self._end(generation, "stop")
        if request.generated >= request.sampling.max_tokens or len(request.tokens) >= self._longest:
            return self._end(generation, "length")
        return None

    def _receive(self) -> None:
        """Take in what has come, and let go what nobody waits for, waited too long, or has no adapter."""
        while self._arriving:
            generation, found = self._arriving[0]
            self._generations[generation.request] = generation  # before it leaves the queue: `live` must not miss it
            self._arriving.popleft()
            self._scheduler.add(generation.request, found)
        failures = self._residency.failures()
        now = time.monotonic()
        for generation in [*self._generations.values()]:
            request = generation.request
            if request.cancelled:
                self._end(generation, "cancelled")
            elif now - request.arrived > self._scheduler.config.timeout:
                self._end(generation, "failed", RequestError(f"not done within {self._scheduler.config.timeout:g} s"))
            elif failed := [failures[own] for own, _ in request.key if own in failures]:
                self._end(generation, "failed", failed[0])

    def _end(self, generation: Generation, finish: Finish, error: LoradeckError | None = None) -> None:
        request = generation.request
        self._scheduler.end(request)
        self._sampler.forget(request)
        del self._generations[request]
        self.stats.ended(request)
        if self._observer:
            self._observer.finished(request, finish)
        generation.end(finish, error if finish == "failed" else None)
