"""The engine's thread: takes requests in, computes step after step, and ends requests."""

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from threading import Event, Thread

from loradeck.errors import LoradeckError, RequestError, RequestTimeoutError
from loradeck.runner.interface import Cache, Runner
from loradeck.runner.request import Finish, Request, Scheduled
from loradeck.sampling import Token, next_tokens
from loradeck.serve.adapter_cache import AdapterCache
from loradeck.serve.drafter import Drafter
from loradeck.serve.generation import Generation
from loradeck.serve.sampler import StepResult, sample
from loradeck.serve.scheduler import Scheduler
from loradeck.serve.stats import Observer, Stats
from loradeck.stored import Stored

TICK = 0.1  # seconds between looks at waiting requests, for patience and time-outs

log = logging.getLogger(__name__)


class Loop:
    """Computes the requests that are added, until it is stopped."""

    def __init__(
        self,
        runner: Runner,
        cache: Cache,
        scheduler: Scheduler,
        drafter: Drafter,
        adapter_cache: AdapterCache,
        *,
        longest: int,
        observer: Observer | None,
    ) -> None:
        """`longest` is the maximum number of tokens in a row."""
        self._runner, self._cache = runner, cache
        self._scheduler, self._drafter, self._adapter_cache = scheduler, drafter, adapter_cache
        self._longest = longest
        self._observer = observer
        self.stats = Stats(scheduler, drafter, cache)
        self.failed = False
        self._generations: dict[Request, Generation] = {}
        self._arriving: deque[tuple[Generation, Mapping[str, Stored]]] = deque()
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

    def add(self, generation: Generation, adapters: Mapping[str, Stored]) -> None:
        """Add a request with its adapters on disk, by content hash."""
        self._arriving.append((generation, adapters))
        if self.failed:  # perhaps just now, too late for the thread to see this one
            self._end_all()
        self.wake()

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._scheduler.waiting) + len(self._arriving)

    @property
    def live(self) -> list[Generation]:
        """The generations that have not ended."""
        return [*self._generations.copy().values(), *(generation for generation, _ in self._arriving.copy())]

    # ---- in the thread

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._receive()
                if not self._step():
                    self._changed.wait(TICK if self._generations else None)
                    self._changed.clear()  # before the next check, so that no later wake-up is lost
        except Exception:
            log.exception("the engine failed")
            self.failed = True
        finally:
            self._end_all()
            self._cache.clear()
            self._drafter.clear()

    def _step(self) -> bool:
        """Compute one step; False if there is nothing to compute."""
        batch = self._schedule()
        if not batch:
            return False
        results = self._run_and_sample(batch)
        self._update(batch, results)
        self._check_drafts(batch, results)
        return True

    def _receive(self) -> None:
        """Take new requests in; end those that are cancelled, late, or whose adapters failed to load."""
        while self._arriving:
            generation, adapters = self._arriving[0]
            self._generations[generation.request] = generation  # before it leaves the queue: `live` must not miss it
            self._arriving.popleft()
            self._scheduler.add(generation.request, adapters)
        failures = self._adapter_cache.failures()
        now = time.monotonic()
        timeout = self._scheduler.config.timeout
        for generation in [*self._generations.values()]:
            request = generation.request
            if request.cancelled:
                self._end(generation, "cancelled")
            elif now - request.arrived > timeout:
                self._end(generation, "failed", RequestTimeoutError(f"not done within {timeout:g} s"))
            elif errors := [failures[sha256] for sha256, _ in request.key if sha256 in failures]:
                self._end(generation, "failed", errors[0])

    def _schedule(self) -> list[Scheduled]:
        now = time.monotonic()
        batch = self._scheduler.schedule(now)
        if self._observer:
            for work in batch:
                if work.request.admitted == now:
                    self._observer.admitted(work.request)
        return self._drafter.draft(batch)

    def _run_and_sample(self, batch: Sequence[Scheduled]) -> list[StepResult]:
        """Run the model and sample. If that fails, do so for each request alone, so that only the culprit fails."""
        try:
            return sample(self._runner.run(batch, self._cache), batch)
        except Exception as error:
            if len(batch) == 1:
                return [StepResult.failed(error)]
            log.warning("a step of %d requests failed; computing each alone: %s", len(batch), error)
            return [result for work in batch for result in self._run_and_sample([work])]

    def _update(self, batch: Sequence[Scheduled], results: Sequence[StepResult]) -> None:
        for work, result in zip(batch, results, strict=True):  # all, before any ends: rows move when one does
            if result.error is None:
                self._scheduler.advance(work.request, work.count)
        for work, result in zip(batch, results, strict=True):
            self._accept(work, result)

    def _accept(self, work: Scheduled, result: StepResult) -> None:
        """Add a result to its request."""
        request, generation = work.request, self._generations[work.request]
        if result.error is not None:
            return self._end(generation, "failed", result.error)
        if result.prompt:
            before = request.computed - work.count
            start = before + 1 if before else 0
            generation.prompt[start : start + len(result.prompt)] = result.prompt
        if request.pending:
            return None  # more of the prompt is to be computed
        if not request.generated:
            self._cache.keep(request)
        if result.token is None:
            return self._end(generation, "length")
        return self._append(request, result.token)

    def _check_drafts(self, batch: Sequence[Scheduled], results: Sequence[StepResult]) -> None:
        """Accept drafts as long as they are the tokens that were chosen: what follows them is computed already.

        Each token is chosen from its own logits, after those before it, as in a step of its own.
        """
        rows = [(work, result.ahead) for work, result in zip(batch, results, strict=True) if result.ahead is not None]
        drafted = [work for work, _ in rows]
        accepted: Counter[Request] = Counter()
        for place in itertools.count():
            rows = [(work, ahead) for work, ahead in rows if self._is_right(work, place)]
            if not rows:
                break
            requests = [work.request for work, _ in rows]
            tokens = next_tokens([ahead[place] for _, ahead in rows], requests)
            for request in requests:
                self._scheduler.advance(request, 1)
            accepted.update(requests)
            for request, token in zip(requests, tokens, strict=True):
                if isinstance(token, Exception):
                    self._end(self._generations[request], "failed", StepResult.failed(token).error)
                else:
                    self._append(request, token)
        for work in drafted:
            self._drafter.record(work, accepted[work.request], runs=work.request in self._generations)

    def _is_right(self, work: Scheduled, place: int) -> bool:
        """Return whether a draft is the token that was chosen, and another follows it."""
        request, drafts = work.request, work.drafts
        return request in self._generations and place < len(drafts) and drafts[place] == request.tokens[-1]

    def _append(self, request: Request, token: Token) -> None:
        """Add a token to its request, and end the request if it is the last one."""
        generation = self._generations[request]
        request.tokens.append(token.id)
        self._count_token(request)
        try:
            generation.push(token)
        except Exception as error:  # the tokenizer's
            return self._end(generation, "failed", StepResult.failed(error).error)
        if token.ends or generation.stopped:
            return self._end(generation, "stop")
        if request.generated >= request.sampling.max_tokens or len(request.tokens) >= self._longest:
            return self._end(generation, "length")
        return None

    def _count_token(self, request: Request) -> None:
        now = time.monotonic()
        since = now - (request.last_token or request.arrived)
        request.first_token = request.first_token or now
        request.last_token = now
        if self._observer:
            self._observer.token(request, since)

    def _end(self, generation: Generation, finish: Finish, error: LoradeckError | None = None) -> None:
        request = generation.request
        self._scheduler.end(request)
        del self._generations[request]
        self.stats.count_end()
        if self._observer:
            self._observer.finished(request, finish)
        generation.end(finish, error)

    def _end_all(self) -> None:
        for generation in self.live:
            if self.failed:
                generation.end("failed", RequestError("the engine failed"))
            else:
                generation.end("cancelled")
        self._generations.clear()
        self._arriving.clear()
