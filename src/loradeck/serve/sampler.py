"""What a step computed for each request: the next token, and log-probabilities of the prompt.

S positions with logits   V vocabulary
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from loradeck.errors import LoradeckError, RequestError
from loradeck.runner.request import Scheduled
from loradeck.sampling import Token, next_tokens, score

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed for one request."""

    prompt: tuple[Token, ...] = ()
    """Tokens of the prompt with their log-probabilities, if requested."""
    token: Token | None = None
    """The next token; None while the prompt is not read to its end."""
    error: LoradeckError | None = None
    ahead: Tensor | None = None
    """Logits (drafts, V) of what follows each draft."""

    @classmethod
    def failed(cls, error: Exception) -> Self:
        """Return the result of a request that failed; of an unexpected error, clients see the first line."""
        if not isinstance(error, LoradeckError):
            log.error("a request could not be computed", exc_info=error)
            error = RequestError(f"the request could not be computed: {str(error).partition(chr(10))[0]}")
        return cls(error=error)


def sample(logits: Sequence[Tensor], batch: Sequence[Scheduled]) -> list[StepResult]:
    """Return the result of each scheduled request, from its logits (S, V)."""
    ready = [i for i, work in enumerate(batch) if work.ends and work.request.sampling.max_tokens]
    sampled = next_tokens([logits[i][-1 - len(batch[i].drafts)] for i in ready], [batch[i].request for i in ready])
    tokens = dict(zip(ready, sampled, strict=True))
    results = []
    for i, work in enumerate(batch):
        token = tokens.get(i)
        try:
            if isinstance(token, Exception):
                raise token
            ahead = logits[i][-len(work.drafts) :] if work.drafts else None
            results.append(StepResult(_prompt_logprobs(logits[i], work), token, ahead=ahead))
        except Exception as error:
            results.append(StepResult.failed(error))
    return results


def _prompt_logprobs(logits: Tensor, work: Scheduled) -> tuple[Token, ...]:
    """Return the prompt's tokens that these logits score: each position scores the next token."""
    request, count = work.request, work.request.sampling.prompt_logprobs
    if count is None or request.computed >= len(request.prompt):
        return ()
    first = (Token(request.tokens[0]),) if request.computed == 0 else ()
    scored = request.prompt[request.computed + 1 : request.computed + work.count + 1]
    if not scored:
        return first
    return (*first, *score(logits[: len(scored), : request.vocabulary], scored, count))
