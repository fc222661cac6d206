"""Adds drafts to a step, and keeps count of those that were accepted."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from loradeck.runner.request import Key, Scheduled
from loradeck.runner.speculation import MEMORY_BOUND, draft_counts
from loradeck.serve.config import EngineConfig
from loradeck.serve.scheduler import Rows


class Drafter:
    """Speculative decoding for the requests of an engine whose next token is due.

    Attributes:
        drafts: how often a request had drafts in a step; the names are vLLM's.
        draft_tokens: their tokens.
        accepted_tokens: those that were accepted.
    """

    def __init__(
        self, config: EngineConfig, rows: Rows, is_batch_invariant: Callable[[Key], bool], *, longest: int
    ) -> None:
        """`longest` is the maximum number of tokens in a row."""
        self._config, self._rows = config, rows
        self._is_batch_invariant = is_batch_invariant
        self._longest = longest
        self.drafts = self.draft_tokens = self.accepted_tokens = 0

    def draft(self, batch: Sequence[Scheduled]) -> list[Scheduled]:
        """Return a step with drafts where they are likely to pay; prompts and room for others come first."""
        step = [*batch]
        tokens = sum(work.count for work in batch)
        if tokens >= MEMORY_BOUND:
            return step
        proposals = {i: drafts for i, work in enumerate(batch) if (drafts := self._propose(work))}
        acceptances = [batch[i].request.acceptance for i in proposals]
        counts = draft_counts(acceptances, [*map(len, proposals.values())], tokens, self._config.max_step_tokens)
        for (i, drafts), count in zip(proposals.items(), counts, strict=True):
            request = batch[i].request
            if count and self._rows.reserve(request, len(request.tokens) + count):
                step[i] = replace(batch[i], drafts=drafts[:count])
        return step

    def record(self, work: Scheduled, accepted: int, *, runs: bool) -> None:
        """Learn how many drafts of a request were accepted, and give the room of the others back if it `runs` on.

        So nobody ever gives way for a draft.
        """
        request = work.request
        self.drafts += 1
        self.draft_tokens += len(work.drafts)
        self.accepted_tokens += accepted
        request.acceptance.record(len(work.drafts), accepted)
        if runs:
            self._rows.reserve(request, len(request.tokens))

    def _propose(self, work: Scheduled) -> list[int]:
        request = work.request
        limit = min(
            self._config.num_speculative_tokens,
            request.sampling.max_tokens - request.generated - 1,
            self._longest - len(request.tokens) - 1,
        )
        if not work.ends or limit < 1 or not self._is_batch_invariant(request.key):
            return []
        return request.lookup.propose(request.tokens, limit)
