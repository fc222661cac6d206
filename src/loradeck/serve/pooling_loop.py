"""The steps of pooling: each is one batch of whole rows, which then end."""

import logging
import time
from collections.abc import Sequence

from torch import Tensor

from loradeck.errors import LoradeckError, RequestError
from loradeck.runner.pooling_runner import PoolingRunner, check_finite
from loradeck.runner.request import Request
from loradeck.serve.adapter_cache import AdapterCache
from loradeck.serve.config import EngineConfig
from loradeck.serve.pooling_result import PoolingResult
from loradeck.serve.request_loop import RequestLoop
from loradeck.serve.scheduler import Scheduler
from loradeck.serve.stats import Observer, Stats

log = logging.getLogger(__name__)


class PaddedRows:
    """The rows of a step: as many as fit the tokens of a step with their padding, but at least one."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._lengths: dict[Request, int] = {}

    def reserve(self, request: Request, tokens: int) -> bool:
        """Add a row of this many tokens; False if there is no room."""
        lengths = {**self._lengths, request: tokens}
        if len(lengths) > 1 and len(lengths) * max(lengths.values()) > self._max_tokens:
            return False
        self._lengths = lengths
        return True

    def release(self, request: Request) -> None:
        """Take a row out."""
        self._lengths.pop(request, None)


class PoolingLoop(RequestLoop[PoolingResult, Stats]):
    """Computes the rows that are added, until it is stopped."""

    def __init__(
        self, runner: PoolingRunner, config: EngineConfig, adapter_cache: AdapterCache, observer: Observer | None
    ) -> None:
        scheduler = Scheduler(config, PaddedRows(config.max_step_tokens), adapter_cache)
        super().__init__(scheduler, adapter_cache, Stats(scheduler), observer)
        self._runner = runner

    def _step(self) -> bool:
        now = time.monotonic()
        requests = [work.request for work in self._scheduler.schedule(now)]
        if not requests:
            return False
        if self._observer:
            for request in requests:
                self._observer.admitted(request)
        answers = [self._answers[request] for request in requests]
        for answer, result in zip(answers, self._compute(answers), strict=True):
            self._scheduler.advance(answer.request, answer.request.pending)
            if isinstance(result, LoradeckError):
                self._end(answer, "failed", result)
            else:
                answer.succeed(result)
                self._end(answer, "stop")
        return True

    def _compute(self, answers: Sequence[PoolingResult]) -> list[Tensor | LoradeckError]:
        """Compute a batch. If that fails, compute each row alone, so that only the culprit fails."""
        try:
            results = self._runner.run([each.row for each in answers], [dict(each.request.key) for each in answers])
        except Exception as error:
            if len(answers) == 1:
                return [_failure(error)]
            log.warning("a batch of %d rows failed; computing each alone: %s", len(answers), error)
            return [result for answer in answers for result in self._compute([answer])]
        return [_checked(result) for result in results]


def _checked(result: Tensor) -> Tensor | LoradeckError:
    try:
        return check_finite(result)
    except LoradeckError as error:
        return error


def _failure(error: Exception) -> LoradeckError:
    if isinstance(error, LoradeckError):
        return error
    log.error("a row failed", exc_info=error)
    return RequestError(f"the row could not be computed: {error}")
