"""A smaller model that drafts what a larger one may say: it continues requests greedily, over its own KV cache."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from loradeck.base.load import Base
from loradeck.base.weights import shared_copy
from loradeck.errors import ConfigError
from loradeck.runner.choice import runner_of
from loradeck.runner.interface import Runner
from loradeck.runner.request import Request, Scheduled
from loradeck.runner.speculation import FIRST_RATE

log = logging.getLogger(__name__)
READ = 256  # tokens of a text that are read before a step; longer ones have their first drafts later


@dataclass(eq=False, slots=True)
class Row:
    """A request's text as the draft model has read it, and drafts of its own after it."""

    copy: Request
    length: int = 0
    """Tokens of the request's when it was last continued; what the model has after them were drafts."""

    def follow(self, request: Request) -> None:
        """Read on: keep the drafts that were right, and take the tokens that were not drafted."""
        copy, place = self.copy, self.length
        while place < min(len(copy.tokens), len(request.tokens)) and copy.tokens[place] == request.tokens[place]:
            place += 1
        copy.tokens[place:] = request.tokens[place:]
        copy.computed = min(copy.computed, place, len(copy.tokens) - 1)
        self.length = len(copy.tokens)


class DraftModel:
    """Drafts tokens for the requests of an engine.

    Attributes:
        cost: of a draft, in steps of the model that it drafts for: the share of its bytes.
    """

    def __init__(self, draft: Base, base: Base, runner: Runner, budget: int) -> None:
        """`runner` computes the base, whose KV cache has `budget` bytes; the draft's has room for as many tokens.

        Raises:
            ConfigError: the draft has another vocabulary than the base.
            BaseModelError, LoradeckError: as `runner_of`.
        """
        self._runner = runner_of(shared_copy(draft.model))
        fewer = self._runner.vocabulary < runner.vocabulary
        if fewer or draft.tokenizer.get_vocab() != base.tokenizer.get_vocab():
            raise ConfigError(
                f"the draft model {draft.name} has another vocabulary than {base.name}",
                hint="Give a smaller model with the same tokenizer, as others of its family have.",
            )
        self._vocabulary = runner.vocabulary
        self._cache = self._runner.new_cache(budget * self._runner.token_bytes // runner.token_bytes)
        self._longest = min(self._cache.max_tokens, draft.context or self._cache.max_tokens)
        self._rows: dict[Request, Row] = {}
        sizes = [sum(parameter.nbytes for parameter in each.model.parameters()) for each in (draft, base)]
        self.cost = sizes[0] / sizes[1]
        if self.cost >= FIRST_RATE:
            log.warning(
                "the draft model %s is too large to save time: %.0f %% of the base", draft.name, 100 * self.cost
            )

    def propose(self, counts: Mapping[Request, int]) -> dict[Request, list[int]]:
        """Return up to so many tokens that may follow each request; none while its text is read, or without room."""
        rows = {request: self._follow(request) for request in counts}
        drafts: dict[Request, list[int]] = {request: [] for request in counts}
        left = READ
        batch: dict[Request, Scheduled] = {}
        for request, row in rows.items():
            count = min(row.pending, left)
            length = len(row.tokens) + counts[request]
            if count and length <= self._longest and self._cache.reserve(row, length):
                batch[request] = Scheduled(row, count)
                left -= count
        while batch:
            logits = self._runner.run([*batch.values()], self._cache)
            for (request, work), each in zip([*batch.items()], logits, strict=True):
                ends = work.ends
                work.request.computed += work.count
                if ends:
                    token = int(each[-1, : self._vocabulary].argmax())
                    work.request.tokens.append(token)
                    drafts[request].append(token)
                    batch[request] = Scheduled(work.request, 1)
                if not ends or len(drafts[request]) == counts[request]:
                    del batch[request]
        return drafts

    def keep_only(self, requests: Collection[Request]) -> None:
        """Free what it has of all other requests: they have ended, or gave way."""
        for request in [request for request in self._rows if request not in requests]:
            self._cache.release(self._rows.pop(request).copy)

    def clear(self) -> None:
        """Free all memory of requests."""
        self._rows.clear()
        self._cache.clear()

    def _follow(self, request: Request) -> Request:
        row = self._rows.setdefault(request, Row(Request(())))
        row.follow(request)
        return row.copy
