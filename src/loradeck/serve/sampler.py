"""Chooses each request's next token from its scores. Knows numbers; knows no model and no text.

S scored positions   V vocabulary

The order: bias, penalties, stop tokens that come too early; then temperature, top_k, top_p, min_p, as transformers has
them. Log-probabilities are of the model's own distribution, before all of these.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loradeck.errors import LoradeckError, RequestError
from loradeck.serve.request import Request, SamplingParams, Scheduled, Token

CANDIDATES = 1024  # of the likeliest tokens top_p looks at, before it looks at all
COLD = 1e-5  # a temperature below is 0: scores divided by it may overflow, and only ties would come out otherwise


@dataclass(frozen=True, slots=True)
class Choice:
    """What became of one request's work."""

    prompt: tuple[Token, ...] = ()
    """Tokens of the prompt with their log-probabilities, where they were asked for."""
    token: Token | None = None
    """The next token; None where the prompt goes on."""
    error: LoradeckError | None = None

    @classmethod
    def failed(cls, error: Exception) -> "Choice":
        """Make one of what went wrong."""
        if isinstance(error, LoradeckError):
            return cls(error=error)
        return cls(error=RequestError(f"the request could not be computed: {str(error).partition(chr(10))[0]}"))


@dataclass(eq=False)
class Sampler:
    """Chooses tokens; `stops` are the base's own stop tokens."""

    stops: frozenset[int]
    _chances: dict[Request, random.Random] = field(default_factory=dict)

    def choose(self, scores: Sequence[Tensor], batch: Sequence[Scheduled]) -> list[Choice]:
        """Return a choice for each work; `scores` (S, V) are those of its scored tokens, in order."""
        ending = [index for index, work in enumerate(batch) if work.ends]
        greedy = {index: place for place, index in enumerate(i for i in ending if _is_plain(batch[i].request))}
        best: list[tuple[float, int]] = []
        if greedy:
            values, tokens = torch.stack([scores[index][-1] for index in greedy]).max(-1)
            best = list(zip(values.tolist(), tokens.tolist(), strict=True))
        choices = []
        for index, work in enumerate(batch):
            try:
                prompt = self._prompt(scores[index], work)
                token = None
                if index in greedy:
                    value, token_id = best[greedy[index]]
                    _check(value)
                    token = Token(token_id, ends=self._ends(work.request, token_id))
                elif work.ends and work.request.sampling.max_tokens:
                    token = self._next(scores[index][-1].float(), work.request)
                choices.append(Choice(prompt, token))
            except Exception as error:  # of this request: the others have drawn, and are not to draw again
                choices.append(Choice.failed(error))
        return choices

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request."""
        self._chances.pop(request, None)

    def _next(self, scores: Tensor, request: Request) -> Token:
        """Choose one token from scores (V,)."""
        sampling = request.sampling
        _check(float(scores.max()))
        own = self._adjusted(scores, request)
        best, likeliest = own.max(-1)
        if float(best) == -math.inf:
            raise RequestError("every token is ruled out", hint="Ask with a smaller logit_bias.")
        token = int(likeliest) if sampling.temperature < COLD else self._drawn(own, request)
        ends = self._ends(request, token)
        if sampling.logprobs is None:
            return Token(token, ends=ends)
        logprobs = scores.log_softmax(-1)
        return Token(token, float(logprobs[token]), _likeliest(logprobs, sampling.logprobs), ends=ends)

    def _adjusted(self, scores: Tensor, request: Request) -> Tensor:
        """Return the scores after bias, penalties, and stop tokens that come too early."""
        sampling = request.sampling
        own = scores.clone()
        for token, bias in sampling.logit_bias.items():
            own[token] += bias
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(request.tokens)), device=own.device)
            penalty = sampling.repetition_penalty
            own[seen] = torch.where(own[seen] > 0, own[seen] / penalty, own[seen] * penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = Counter(request.tokens[request.prompt_length :])
            for token, count in counts.items():
                own[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
        if request.generated < sampling.min_tokens:
            early = sampling.stop_tokens if sampling.ignore_eos else sampling.stop_tokens | self.stops
            own[torch.tensor(sorted(early), dtype=torch.long, device=own.device)] = float("-inf")
        return own

    def _drawn(self, scores: Tensor, request: Request) -> int:
        """Draw a token: the place of a number between 0 and 1 among the probabilities, put end to end."""
        sampling = request.sampling
        scores = scores / sampling.temperature
        ids: Tensor | None = None
        total = scores.logsumexp(-1)
        if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
            width = min(sampling.top_k or CANDIDATES, len(scores))
            best, ids = scores.topk(width)
            if not sampling.top_k and _outside(best, total, sampling):
                best, ids = scores.sort(descending=True)
            if sampling.top_k:
                total = best.logsumexp(-1)
            scores = _cut(best, total, sampling)
        chance = self._chances.get(request)
        if chance is None:
            chance = self._chances[request] = random.Random(sampling.seed)
        heaps = scores.double().softmax(-1).cumsum(-1)
        place = int(torch.searchsorted(heaps, chance.random() * float(heaps[-1]), right=True))
        place = min(place, len(scores) - 1)
        return int(ids[place]) if ids is not None else place

    def _ends(self, request: Request, token: int) -> bool:
        sampling = request.sampling
        return token in sampling.stop_tokens or (token in self.stops and not sampling.ignore_eos)

    @staticmethod
    def _prompt(scores: Tensor, work: Scheduled) -> tuple[Token, ...]:
        """Return the prompt's tokens that a work's scores are about: each position tells of the next one."""
        request, asked = work.request, work.request.sampling.prompt_logprobs
        if asked is None or request.computed >= request.prompt_length:
            return ()
        first = (Token(request.tokens[0]),) if request.computed == 0 else ()
        follow = request.tokens[request.computed + 1 : min(request.computed + work.count + 1, request.prompt_length)]
        if not follow:
            return first
        logprobs = scores[: len(follow)].float().log_softmax(-1)
        _check(float(logprobs.max()))
        own = logprobs.gather(1, torch.tensor(follow, device=scores.device)[:, None])[:, 0].tolist()
        return first + tuple(
            Token(token, value, _likeliest(row, asked)) for token, value, row in zip(follow, own, logprobs, strict=True)
        )


def _is_plain(request: Request) -> bool:
    """Say whether the next token is simply the likeliest."""
    own = request.sampling
    return (
        own.temperature == 0
        and own.logprobs is None
        and not own.logit_bias
        and own.repetition_penalty == 1
        and not (own.presence_penalty or own.frequency_penalty)
        and own.min_tokens <= request.generated
        and own.max_tokens > 0
    )


def _likeliest(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _outside(best: Tensor, total: Tensor, sampling: SamplingParams) -> bool:
    """Say whether what is asked for reaches beyond the candidates."""
    if sampling.top_p < 1:
        return float((best - total).exp().sum()) < sampling.top_p
    return float(best[-1] - best[0]) >= math.log(sampling.min_p)


def _cut(best: Tensor, total: Tensor, sampling: SamplingParams) -> Tensor:
    """Return the scores, best first, with -inf where top_p or min_p leaves a token out; the best one always stays."""
    out = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    if sampling.top_p < 1:
        before = (best - total).exp().cumsum(-1) - (best - total).exp()
        out |= before >= sampling.top_p
    if sampling.min_p:
        out |= best - best[0] < math.log(sampling.min_p)
    out[0] = False
    return best.masked_fill(out, float("-inf"))


def _check(best: float) -> None:
    """Refuse scores the highest of which is no number: NaN, or beyond what the dtype can say."""
    if not math.isfinite(best):
        hint = "Ask without the adapter, or with a lower scale."
        raise RequestError("the model's scores are not numbers", hint=hint)
