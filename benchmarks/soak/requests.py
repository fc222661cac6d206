"""What is asked at random, what came back, and what was counted. Knows names and tokens; knows no engine."""

import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from benchmarks.soak.store import Crowd

Weights = tuple[tuple[str, float], ...]
Route = tuple[tuple[Path, float], ...]
SCALES = (0.5, -0.7, 1.3)
BLEND = 3  # adapters of a blend at most
TEMPERATURES = (0.7, 1.0)


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: tuple[int, ...]
    weights: Weights
    """Of each adapter, by name or name@version; () is the base."""
    answer: int
    """Tokens at most."""
    temperature: float
    seed: int
    scored: bool
    """Whether log-probabilities are asked for."""
    endless: bool
    """Whether it goes on after a stop token."""
    leaves: int | None
    """After so many tokens nobody waits for it any more."""


class Questions:
    """Requests of one client, at random."""

    def __init__(self, crowd: Crowd, vocabulary: int, seed: int, *, longest: int, answer: int) -> None:
        """Prompts have up to `longest` tokens, and answers up to `answer`."""
        self.crowd = crowd
        self.chance = random.Random(seed)
        self._vocabulary, self._longest, self._answer = vocabulary, longest, answer
        shared = random.Random(0)  # the same for all clients
        self._beginnings = [self._text(shared, longest * part // 6) for part in (2, 3, 5)]

    def next(self) -> Asked:
        chance = self.chance
        begins = chance.choice(self._beginnings) if chance.random() < 0.4 else ()
        room = self._longest - len(begins)
        answer = chance.randint(1, self._answer)
        return Asked(
            prompt=begins + self._text(chance, 1 + int(room * chance.random() ** 3)),  # most are short
            weights=self._weights(),
            answer=answer,
            temperature=chance.choice(TEMPERATURES) if chance.random() < 0.3 else 0.0,
            seed=chance.randrange(2**32),
            scored=chance.random() < 0.3,
            endless=chance.random() < 0.5,
            leaves=chance.randrange(answer) if chance.random() < 0.15 else None,
        )

    def _weights(self) -> Weights:
        kind = self.chance.random()
        if kind < 0.1:
            return ()
        if kind < 0.25:
            names = {self.crowd.draw(self.chance) for _ in range(BLEND)}
            return tuple((name, round(self.chance.uniform(-0.5, 1), 2) or 0.5) for name in sorted(names))
        name = self.crowd.draw(self.chance)
        if kind < 0.4:
            return ((name, self.chance.choice(SCALES)),)
        if kind < 0.5:
            return ((f"{name}@{self.chance.randint(1, self.crowd.latest(name))}", 1.0),)
        return ((name, 1.0),)

    def _text(self, chance: random.Random, length: int) -> tuple[int, ...]:
        return tuple(chance.randrange(3, self._vocabulary) for _ in range(length))


@dataclass(frozen=True)
class Meaning:
    """What a request's names may have meant: for each, the first and the last version that can have been meant."""

    crowd: Crowd
    weights: Weights
    first: tuple[int, ...]
    last: tuple[int, ...]

    @classmethod
    def before(cls, crowd: Crowd, weights: Weights) -> "Meaning":
        """Begin it before the request is handed in; `after` ends it."""
        first = tuple(int(spec.partition("@")[2] or crowd.latest(spec)) for spec, _ in weights)
        return cls(crowd, weights, first, first)

    def after(self) -> "Meaning":
        """Return it as of now, when the request has been taken in."""
        last = tuple(int(spec.partition("@")[2] or self.crowd.newest(spec)) for spec, _ in self.weights)
        return Meaning(self.crowd, self.weights, self.first, last)

    def routes(self) -> Iterator[Route]:
        ranges = [range(first, last + 1) for first, last in zip(self.first, self.last, strict=True)]
        for versions in product(*ranges):
            folders = [
                self.crowd.folder(spec.partition("@")[0], version)
                for (spec, _), version in zip(self.weights, versions, strict=True)
            ]
            yield tuple(zip(folders, (weight for _, weight in self.weights), strict=True))

    def overtaken(self) -> bool:
        """Say whether by now a newer version of an adapter is the latest than can have been meant."""
        return any(
            "@" not in spec and self.crowd.latest(spec) > last
            for (spec, _), last in zip(self.weights, self.last, strict=True)
        )


@dataclass(frozen=True)
class Told:
    """An answer, whole or as far as somebody waited for it."""

    asked: Asked
    routes: Sequence[Route]
    """One of these was meant."""
    tokens: Sequence[int]
    logprobs: Sequence[float]
    """Of the tokens; empty where they were not asked for."""
    finish: str


@dataclass
class Ledger:
    """What happened; any thread writes to it."""

    counts: Counter[str] = field(default_factory=Counter)
    told: list[Told] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Names of adapters that were asked for."""
    errors: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def keep(self, told: Told) -> None:
        """Count an answer, and keep it to be judged."""
        with self._lock:
            self.told.append(told)
            self.counts[told.finish] += 1
            self.counts["tokens"] += len(told.tokens)
            self.used.update(spec.partition("@")[0] for spec, _ in told.asked.weights)

    @property
    def lost(self) -> int:
        """Requests that came to no end that a client could know of."""
        ends = ("stop", "length", "cancelled", "refused")
        return self.counts["requests"] - sum(self.counts[end] for end in ends)

    def fail(self, what: object) -> None:
        """Count what should not have happened."""
        with self._lock:
            self.counts["faults"] += 1
            self.errors.append(f"{type(what).__name__}: {what}"[:300])
