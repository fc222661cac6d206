"""The steps of generation: prompts and next tokens of all running requests, through the model and the sampler."""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Sequence

from loradeck.runner.interface import Cache, Runner
from loradeck.runner.request import Request, Scheduled
from loradeck.sampling import Token, next_tokens
from loradeck.serve.adapter_cache import AdapterCache
from loradeck.serve.drafter import Drafter
from loradeck.serve.generation import Generation
from loradeck.serve.request_loop import RequestLoop
from loradeck.serve.sampler import StepResult, sample
from loradeck.serve.scheduler import Scheduler
from loradeck.serve.stats import GenerationStats, Observer

log = logging.getLogger(__name__)


class Loop(RequestLoop[Generation, GenerationStats]):
    """Continues the prompts that are added, until it is stopped."""

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
        super().__init__(scheduler, adapter_cache, GenerationStats(scheduler, drafter, cache), observer)
        self._runner, self._cache = runner, cache
        self._drafter = drafter
        self._longest = longest

    # ---- in the thread

    def _step(self) -> bool:
        """Compute one step; False if there is nothing to compute."""
        batch = self._schedule()
        if not batch:
            return False
        results = self._run_and_sample(batch)
        self._update(batch, results)
        self._check_drafts(batch, results)
        return True

    def _clear(self) -> None:
        self._cache.clear()
        self._drafter.clear()

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
        request, generation = work.request, self._answers[work.request]
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
                    self._end(self._answers[request], "failed", StepResult.failed(token).error)
                else:
                    self._append(request, token)
        for work in drafted:
            self._drafter.record(work, accepted[work.request], runs=work.request in self._answers)

    def _is_right(self, work: Scheduled, place: int) -> bool:
        """Return whether a draft is the token that was chosen, and another follows it."""
        request, drafts = work.request, work.drafts
        return request in self._answers and place < len(drafts) and drafts[place] == request.tokens[-1]

    def _append(self, request: Request, token: Token) -> None:
        """Add a token to its request, and end the request if it is the last one."""
        generation = self._answers[request]
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
