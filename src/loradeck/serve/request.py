"""One generation, as the engine sees it: token ids, adapters by the hash of their content. Knows no text and no tensor.

T prompt tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from loradeck.errors import ConfigError

Key: TypeAlias = tuple[tuple[str, float], ...]
"""Which adapters, as (sha256, weight), sorted; () is the base. Every cache's keys begin with it (law 7)."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen, and when they end.

    Raises:
        ConfigError: a number out of its bounds.
    """

    max_tokens: int = 128
    """New tokens at most; 0 reads the prompt only, for its log-probabilities."""
    min_tokens: int = 0
    """Before so many, no stop token is chosen."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    """Besides the base's own."""
    stop: Sequence[str] = ()
    """Strings that end the answer's text and are no part of it. Not before `min_tokens`, as with stop tokens."""
    ignore_eos: bool = False
    """Go on after the base's own stop tokens."""
    logprobs: int | None = None
    """With each token its log-probability and those of so many likeliest ones; None for neither."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, but for the first."""

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
        wrong = [f"{name}={getattr(self, name)!r}" for name, holds in bounds.items() if not holds]
        if wrong:
            raise ConfigError("tokens cannot be chosen so", wrong, hint="Give numbers within their bounds.")


@dataclass(frozen=True, slots=True)
class Token:
    """One token, with what was asked for about it."""

    id: int
    logprob: float | None = None
    """Natural, of the model's own distribution, before temperature, penalties and cuts."""
    top: tuple[tuple[int, float], ...] = ()
    """(id, logprob) of the likeliest, best first."""
    ends: bool = False
    """It is a stop token: counted, but no part of the answer's text."""


@dataclass(eq=False, slots=True)
class Request:
    """A generation on its way."""

    id: str
    tokens: list[int]
    """The prompt, then what was generated."""
    prompt_length: int
    key: Key
    sampling: SamplingParams
    adapter: str = ""
    """What the client called its adapters, for people and metrics; "" is the base."""
    tenant: str = ""
    """Whom fairness counts its tokens to, below its adapters: an API key's name."""
    arrived: float = 0.0
    """time.monotonic() at its arrival; the three below too, 0 until it comes to that."""
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    computed: int = 0
    """Of `tokens`, those whose keys and values the row holds."""
    cached: int = 0
    """Of the prompt, the tokens that were found in the prefix cache."""
    cancelled: bool = False
    """Nobody waits for it any more; it is dropped at the next step."""

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_length]

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens still to be computed before the next one can be chosen."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What a step computes of one request: its next `count` tokens."""

    request: Request
    count: int

    @property
    def ends(self) -> bool:
        """Whether the request's next token can be chosen afterwards."""
        return self.count == self.request.pending

    @property
    def scored(self) -> int:
        """How many of the tokens are asked what follows them: the last ones."""
        if self.request.sampling.prompt_logprobs is not None and self.request.computed < self.request.prompt_length - 1:
            return self.count
        return int(self.ends)
