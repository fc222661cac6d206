"""The choice of the next token from a model's logits, for generate, stream and the engine.

The order: bias, penalties, stop tokens that come too early; then temperature, top_k, top_p, min_p, as in transformers.
Log-probabilities are those of the model's own distribution, before all of these.

N sequences   V vocabulary
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loradeck.errors import ConfigError, LogitsError
from loradeck.native import sampling as native
from loradeck.native.sampling import Choice, Row

COLD = 1e-5  # a lower temperature counts as 0: only ties would differ
HOT = 1e30  # a higher one counts as this, which float32 has


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of an answer are chosen and when it ends, in vLLM's words.

    Raises:
        ConfigError: a value out of its bounds, or `min_tokens` above `max_tokens`.
    """

    max_tokens: int = 128
    """New tokens at most; 0 only computes the prompt, for its log-probabilities."""
    min_tokens: int = 0
    """No stop token is chosen, and no stop string ends the answer, within the first `min_tokens` tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities add up to this."""
    top_k: int = 0
    """Keep the K likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this probable, relative to the likeliest."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """Makes the choices repeatable, whatever else is in the batch."""
    stop: Sequence[str] = ()
    """Strings that end the answer; neither they nor what follows is part of its text. The engine's only."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, besides those of the base and of its tokenizer."""
    ignore_eos: bool = False
    """Do not end at the stop tokens of the base and of its tokenizer."""
    logprobs: int | None = None
    """Return each token's log-probability and those of the K likeliest; None for neither."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, from the second on. The engine's only."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        bounds = {
            "max_tokens": self.max_tokens >= 0,
            "min_tokens": self.min_tokens >= 0,
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "presence_penalty": math.isfinite(self.presence_penalty),
            "frequency_penalty": math.isfinite(self.frequency_penalty),
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "logit_bias": all(bias < math.inf for bias in self.logit_bias.values()),
            "stop": all(isinstance(stop, str) and stop for stop in self.stop),
            "logprobs": self.logprobs is None or self.logprobs >= 0,
            "prompt_logprobs": self.prompt_logprobs is None or self.prompt_logprobs >= 0,
        }
        problems = [f"{name}={getattr(self, name)!r}" for name, valid in bounds.items() if not valid]
        if problems:
            raise ConfigError("invalid sampling parameters", problems, hint="Give values within their bounds.")
        if self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}, and the answer may have at most {self.max_tokens} tokens",
                hint="Give a smaller min_tokens, or a larger max_tokens.",
            )


@dataclass(frozen=True, slots=True)
class Token:
    """One token, with its log-probabilities if requested."""

    id: int
    logprob: float | None = None
    """Natural logarithm."""
    top: tuple[tuple[int, float], ...] = ()
    """(id, logprob) of the likeliest tokens, best first."""
    ends: bool = False
    """A stop token: counted, but no part of the answer's text."""


@dataclass(eq=False, slots=True)
class TokenSequence:
    """A prompt and the answer so far."""

    prompt: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = field(default=frozenset(), kw_only=True)
    """Tokens that end the answer unless it ignores them: those of the base and of the sequence's tokenizer."""
    vocabulary: int | None = field(default=None, kw_only=True)
    """How many tokens there are for its adapters; logits beyond them are other rows'. None: as many as logits."""
    tokens: list[int] = field(init=False)
    """The prompt, then the answer."""
    rng: random.Random | None = field(init=False, default=None)
    """Created with the first token that is drawn."""
    adjustment: "Adjustment | None" = field(init=False, default=None)
    """Created with the first token that is chosen from changed logits."""

    def __post_init__(self) -> None:
        self.tokens = [*self.prompt]

    @property
    def generated(self) -> int:
        """The answer's tokens."""
        return len(self.tokens) - len(self.prompt)


class Adjustment:
    """What changes one sequence's logits: bias, penalties, and stop tokens that come too early.

    Its tensors are built once, so that a step costs the same with any number of biased or repeated tokens.
    """

    def __init__(self, sequence: TokenSequence, logits: Tensor) -> None:
        """Read what does not change; `logits` (V,) give the size and the device."""
        self._read = 0  # tokens of the sequence that are counted
        self._bias: tuple[Tensor, Tensor] | None = None
        self._early = self._seen = self._counts = None
        sampling, device = sequence.sampling, logits.device
        if sampling.logit_bias:
            ids = torch.tensor([*sampling.logit_bias], device=device)
            self._bias = ids, torch.tensor([*sampling.logit_bias.values()], dtype=logits.dtype, device=device)
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(logits), dtype=torch.bool, device=device)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros_like(logits)
        if sampling.min_tokens:
            self._early = torch.tensor([*_ends(sequence)], dtype=torch.long, device=device)

    @staticmethod
    def changes(sequence: TokenSequence) -> bool:
        """Return whether the next token is chosen from other logits than the model's."""
        sampling = sequence.sampling
        return bool(
            sampling.logit_bias
            or sampling.repetition_penalty != 1
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sequence.generated < sampling.min_tokens
        )

    def apply(self, logits: Tensor, sequence: TokenSequence) -> Tensor:
        """Return the changed logits (V,) of the sequence's next token."""
        sampling = sequence.sampling
        self._count_new_tokens(sequence)
        logits = logits.clone()
        if self._bias is not None:
            logits.index_add_(0, *self._bias)
        if self._seen is not None:
            penalty = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._counts is not None:
            logits -= sampling.presence_penalty * (self._counts > 0) + sampling.frequency_penalty * self._counts
        if self._early is not None and sequence.generated < sampling.min_tokens:
            logits[self._early] = -math.inf
        return logits

    def _count_new_tokens(self, sequence: TokenSequence) -> None:
        tokens, answer = sequence.tokens, len(sequence.prompt)
        if self._seen is not None and self._read < len(tokens):
            self._seen[torch.tensor(tokens[self._read :], device=self._seen.device)] = True
        if self._counts is not None and (new := tokens[max(answer, self._read) :]):
            ids = torch.tensor(new, device=self._counts.device)
            self._counts.index_add_(0, ids, torch.ones_like(ids, dtype=self._counts.dtype))
        self._read = len(tokens)


def next_tokens(logits: Tensor | Sequence[Tensor], sequences: Sequence[TokenSequence]) -> list[Token | Exception]:
    """Return the next token of each sequence, from logits (N, V); or the error of a sequence that has none.

    Of logits beyond a sequence's vocabulary nothing is seen.
    An error is the sequence's own: the others have drawn their random numbers, and must not draw again.
    """
    rows: list[Row | Exception] = []
    for row, sequence in zip(logits, sequences, strict=True):
        try:
            rows.append(_row(row[: sequence.vocabulary], sequence))
        except Exception as error:
            rows.append(error)
    choices = iter(_choices([row for row in rows if isinstance(row, Row)]))
    chosen = [row if isinstance(row, Exception) else next(choices) for row in rows]
    return [_token(choice, sequence) for choice, sequence in zip(chosen, sequences, strict=True)]


def score(logits: Tensor, tokens: Sequence[int], count: int) -> list[Token]:
    """Return tokens (N) with their log-probabilities in logits (N, V), and the `count` likeliest of each row.

    Raises:
        LogitsError: a logit is NaN or +Inf, or all of a row are -Inf.
        IndexError: there is no such token.
    """
    choices = native.score(logits, tokens, count)
    for choice in choices:
        if error := _error(choice):
            raise error
    return [Token(choice.token, choice.logprob, choice.top) for choice in choices]


def _row(logits: Tensor, sequence: TokenSequence) -> Row:
    """Return what is asked of the logits (V,) of a sequence's next token; draw its random number."""
    sampling = sequence.sampling
    adjusted = _adjust(logits.float(), sequence) if Adjustment.changes(sequence) else None
    if sampling.temperature < COLD:
        return Row(logits, adjusted, logprobs=sampling.logprobs)
    if sequence.rng is None:
        sequence.rng = random.Random(sampling.seed)
    return Row(
        logits,
        adjusted,
        min(sampling.temperature, HOT),
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sequence.rng.random(),
        sampling.logprobs,
    )


def _adjust(logits: Tensor, sequence: TokenSequence) -> Tensor:
    if sequence.adjustment is None:
        sequence.adjustment = Adjustment(sequence, logits)
    return sequence.adjustment.apply(logits, sequence)


def _token(choice: Choice | Exception, sequence: TokenSequence) -> Token | Exception:
    if isinstance(choice, Exception):
        return choice
    return _error(choice) or Token(choice.token, choice.logprob, choice.top, choice.token in _ends(sequence))


def _ends(sequence: TokenSequence) -> frozenset[int]:
    """Return the tokens that end a sequence's answer."""
    stops = sequence.sampling.stop_token_ids
    return stops if sequence.sampling.ignore_eos else stops | sequence.stop_ids


def _choices(rows: Sequence[Row]) -> Sequence[Choice | Exception]:
    try:
        return native.choose(rows)
    except Exception as error:  # the sequences' own too: all have drawn
        return [error] * len(rows)


def _error(choice: Choice) -> LogitsError | None:
    if not math.isfinite(choice.largest):
        return LogitsError("the model's logits are NaN or Inf", hint="Ask without the adapter, or with a lower scale.")
    if not choice.best > -math.inf:
        return LogitsError("every token is ruled out", hint="Ask with a smaller logit_bias.")
    return None
