"""Adds drafts to a step, and keeps count of those that were accepted."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from loradeck.runner.draft_model import DraftModel
from loradeck.runner.request import Key, Request, Scheduled
from loradeck.runner.speculation import MEMORY_BOUND, Acceptance, draft_counts
from loradeck.serve.config import EngineConfig
from loradeck.serve.scheduler import Rows

log = logging.getLogger(__name__)


class Drafter:
    """Speculative decoding for the requests of an engine whose next token is due.

    Attributes:
        drafts: how often a request had drafts in a step; the names are vLLM's.
        draft_tokens: their tokens.
        accepted_tokens: those that were accepted.
    """

    def __init__(
        self,
        config: EngineConfig,
        rows: Rows,
        is_batch_invariant: Callable[[Key], bool],
        *,
        longest: int,
        model: DraftModel | None = None,
    ) -> None:
        """`longest` is the maximum number of tokens in a row; `model` drafts where a request's own text does not."""
        self._config, self._rows, self._model = config, rows, model
        self._is_batch_invariant = is_batch_invariant
        self._longest = longest
        self._sources: dict[Request, Acceptance] = {}
        """Of the drafts that are not checked yet."""
        self.drafts = self.draft_tokens = self.accepted_tokens = 0

    def draft(self, batch: Sequence[Scheduled]) -> list[Scheduled]:
        """Return a step with drafts where they are likely to pay; prompts and room for others come first."""
        tokens = sum(work.count for work in batch)
        if tokens >= MEMORY_BOUND:
            return [*batch]
        limits = {work.request: limit for work in batch if (limit := self._limit(work)) > 0}
        drafts = {request: request.lookup.propose(request.tokens, limit) for request, limit in limits.items()}
        sources = {request: source for request in limits if (source := self._source(request, drafts[request]))}
        most = [limits[request] for request in sources]
        shares = draft_counts([*sources.values()], most, tokens, self._config.max_step_tokens)
        counts = dict(zip(sources, shares, strict=True))
        if self._model:
            self._model.keep_only({work.request for work in batch})
            requests = [request for request, source in sources.items() if source is request.model_acceptance]
            drafts |= self._ask_model({request: counts[request] for request in requests if counts[request]})
        step = [self._with_drafts(work, drafts.get(work.request, [])[: counts.get(work.request, 0)]) for work in batch]
        self._sources = {work.request: sources[work.request] for work in step if work.drafts}
        return step

    def record(self, work: Scheduled, accepted: int, *, runs: bool) -> None:
        """Learn how many drafts of a request were accepted, and give the room of the others back if it `runs` on.

        So nobody ever gives way for a draft.
        """
        request = work.request
        self.drafts += 1
        self.draft_tokens += len(work.drafts)
        self.accepted_tokens += accepted
        self._sources.pop(request).record(len(work.drafts), accepted)
        if runs:
            self._rows.reserve(request, len(request.tokens))

    def clear(self) -> None:
        """Free the draft model's memory of requests."""
        if self._model:
            self._model.clear()

    def _limit(self, work: Scheduled) -> int:
        """Return the maximum number of drafts of a request."""
        request = work.request
        if not work.ends or not self._is_batch_invariant(request.key):
            return 0
        return min(
            self._config.num_speculative_tokens,
            request.sampling.max_tokens - request.generated - 1,
            self._longest - len(request.tokens) - 1,
        )

    def _source(self, request: Request, drafts: Sequence[int]) -> Acceptance | None:
        """Return how often drafts of the better source were right: of the request's own text, or of the model."""
        text = request.acceptance if drafts else None
        if self._model is None:
            return text
        model = request.model_acceptance = request.model_acceptance or Acceptance(self._model.cost)
        return text if text and text.rate >= model.rate else model

    def _ask_model(self, counts: Mapping[Request, int]) -> dict[Request, list[int]]:
        """Return the model's drafts; of a model that fails, none, now and later."""
        try:
            return self._model.propose(counts) if self._model else {}
        except Exception:  # no request needs it
            log.exception("the draft model failed; it is not asked again")
            self._model = None
            return {request: [] for request in counts}

    def _with_drafts(self, work: Scheduled, drafts: Sequence[int]) -> Scheduled:
        """Return a request's share of the step with drafts, if there is room for them."""
        fits = drafts and self._rows.reserve(work.request, len(work.request.tokens) + len(drafts))
        return replace(work, drafts=drafts) if fits else work
