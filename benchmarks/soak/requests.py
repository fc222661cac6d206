"""Random requests, their answers, and a count of all that happened."""

import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from benchmarks.soak.catalogue import Catalogue
from loradeck.sampling import SamplingParams

Weights = tuple[tuple[str, float], ...]
Route = tuple[tuple[Path, float], ...]
SCALES = (0.5, -0.7, 1.3)
BLEND = 3  # adapters of a blend, at most
TEMPERATURES = (0.7, 1.0)


@dataclass(frozen=True)
class Request:
    """What a client sends, and when it goes away."""

    prompt: tuple[int, ...]
    weights: Weights
    """Of each adapter, by name or name@version; () is the base."""
    max_tokens: int
    temperature: float
    seed: int
    logprobs: bool
    ignore_eos: bool
    cancel_after: int | None
    """Tokens after which the client goes away."""

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            logprobs=0 if self.logprobs else None,
        )


class RandomRequests:
    """One client's requests."""

    def __init__(self, catalogue: Catalogue, vocab_size: int, seed: int, *, max_prompt: int, max_tokens: int) -> None:
        self.catalogue = catalogue
        self.rng = random.Random(seed)
        self._vocab_size, self._max_prompt, self._max_tokens = vocab_size, max_prompt, max_tokens
        shared = random.Random(0)  # the same for all clients
        self._prefixes = [self._text(shared, max_prompt * part // 6) for part in (2, 3, 5)]

    def next(self) -> Request:
        rng = self.rng
        prefix = rng.choice(self._prefixes) if rng.random() < 0.4 else ()
        room = self._max_prompt - len(prefix)
        max_tokens = rng.randint(1, self._max_tokens)
        return Request(
            prompt=prefix + self._text(rng, 1 + int(room * rng.random() ** 3)),  # most are short
            weights=self._weights(),
            max_tokens=max_tokens,
            temperature=rng.choice(TEMPERATURES) if rng.random() < 0.3 else 0.0,
            seed=rng.randrange(2**32),
            logprobs=rng.random() < 0.3,
            ignore_eos=rng.random() < 0.5,
            cancel_after=rng.randrange(max_tokens) if rng.random() < 0.15 else None,
        )

    def _weights(self) -> Weights:
        kind = self.rng.random()
        if kind < 0.1:
            return ()
        if kind < 0.25:
            names = {self.catalogue.draw(self.rng) for _ in range(BLEND)}
            return tuple((name, round(self.rng.uniform(-0.5, 1), 2) or 0.5) for name in sorted(names))
        name = self.catalogue.draw(self.rng)
        if kind < 0.4:
            return ((name, self.rng.choice(SCALES)),)
        if kind < 0.5:
            return ((f"{name}@{self.rng.randint(1, self.catalogue.latest(name))}", 1.0),)
        return ((name, 1.0),)

    def _text(self, rng: random.Random, length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, self._vocab_size) for _ in range(length))


@dataclass(frozen=True)
class Resolution:
    """The versions that a request's names can resolve to: for each name, the first and the last."""

    catalogue: Catalogue
    weights: Weights
    first: tuple[int, ...]
    last: tuple[int, ...]

    @classmethod
    def before(cls, catalogue: Catalogue, weights: Weights) -> "Resolution":
        """Call it before the request is submitted, and `after` when it has been accepted."""
        first = tuple(int(spec.partition("@")[2] or catalogue.latest(spec)) for spec, _ in weights)
        return cls(catalogue, weights, first, first)

    def after(self) -> "Resolution":
        last = tuple(int(spec.partition("@")[2] or self.catalogue.newest(spec)) for spec, _ in self.weights)
        return Resolution(self.catalogue, self.weights, self.first, last)

    def routes(self) -> Iterator[Route]:
        ranges = [range(first, last + 1) for first, last in zip(self.first, self.last, strict=True)]
        for versions in product(*ranges):
            folders = [
                self.catalogue.folder(spec.partition("@")[0], version)
                for (spec, _), version in zip(self.weights, versions, strict=True)
            ]
            yield tuple(zip(folders, (weight for _, weight in self.weights), strict=True))

    def is_outdated(self) -> bool:
        """Say whether an adapter has a newer version by now than the name can have resolved to."""
        return any(
            "@" not in spec and self.catalogue.latest(spec) > last
            for (spec, _), last in zip(self.weights, self.last, strict=True)
        )


@dataclass(frozen=True)
class Answer:
    """An answer, whole or as far as the client stayed."""

    request: Request
    routes: Sequence[Route]
    """Those that the names can have resolved to."""
    tokens: Sequence[int]
    logprobs: Sequence[float]
    """Of the tokens; empty if the request has none."""
    finish: str


@dataclass
class Ledger:
    """What happened; any thread writes to it."""

    counts: Counter[str] = field(default_factory=Counter)
    answers: list[Answer] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Names of adapters that were requested."""
    errors: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, event: str, number: int = 1) -> None:
        with self._lock:
            self.counts[event] += number

    def add(self, answer: Answer) -> None:
        """Count an answer, and keep it to be judged."""
        with self._lock:
            self.answers.append(answer)
            self.counts[answer.finish] += 1
            self.counts["tokens"] += len(answer.tokens)
            self.used.update(spec.partition("@")[0] for spec, _ in answer.request.weights)

    @property
    def lost(self) -> int:
        """Requests without an end that the client could see."""
        ends = ("stop", "length", "cancelled", "refused")
        return self.counts["requests"] - sum(self.counts[end] for end in ends)

    def fail(self, error: object) -> None:
        """Count something that must not happen."""
        with self._lock:
            self.counts["faults"] += 1
            self.errors.append(f"{type(error).__name__}: {error}"[:300])
