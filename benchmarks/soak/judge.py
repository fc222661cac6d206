"""What a request gets alone: one plain forward of its text through its own adapters, no engine in it.

Each token is judged where the tokens before it are those that were served, so that one that is forgiven does not
excuse those after it. Greedy: it is the likeliest. Drawn: the seed's next number lies in its share of the
probabilities, which are put end to end. What is further off than `BOUND` is held against how far rounding carries on
this very text: embeddings that are moved by their last bit say so.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from benchmarks.soak.requests import Route, Told
from loradeck import Bank, Base
from loradeck.base.text import stop_ids

BOUND = 1e-3  # of log-probabilities, and of the numbers that tokens are drawn by
FAR = 0.1  # what is further off is wrong, whatever rounding does
SHAKES = 4  # times that an answer's embeddings are moved
ROUNDING = 4  # of the furthest that they carried: each product rounds, not the embeddings alone
CONTROLS = 5  # of so many answers one is judged by a wrong adapter too


@dataclass
class Verdict:
    """What was found out about answers."""

    requests: int = 0
    tokens: int = 0
    wrong: int = 0
    forgiven: int = 0
    worst: float = 0.0
    """The largest difference that was forgiven."""
    scored: int = 0
    """Tokens with a log-probability."""
    off: float = 0.0
    """The largest difference of a log-probability."""
    shaken: int = 0
    """SFT further off than `BOUND`, which were held against their rounding."""
    bound: float = BOUND
    """The largest bound that an answer had."""
    ended_wrong: int = 0
    """SFT that ended where they should not have."""

    @property
    def right(self) -> bool:
        return not self.wrong and not self.ended_wrong

    def add(self, other: "Verdict") -> None:
        self.requests += other.requests
        self.tokens += other.tokens
        self.wrong += other.wrong
        self.forgiven += other.forgiven
        self.scored += other.scored
        self.shaken += other.shaken
        self.ended_wrong += other.ended_wrong
        self.worst = max(self.worst, other.worst)
        self.off = max(self.off, other.off)
        self.bound = max(self.bound, other.bound)


@dataclass(frozen=True)
class Measure:
    """How far an answer's tokens are off, and its log-probabilities; of each token served."""

    gaps: Tensor
    logprobs: Tensor

    @classmethod
    def of(cls, scores: Tensor, told: Told) -> Self:
        """Measure by the scores (T, V) that each of the answer's tokens was chosen from."""
        asked, tokens = told.asked, torch.tensor(told.tokens)[:, None]
        logprobs = scores.log_softmax(-1)
        own = logprobs.gather(1, tokens)[:, 0]
        if asked.temperature:
            return cls(_drawn(scores, told.tokens, asked.temperature, asked.seed), own)
        return cls(logprobs.max(-1).values - own, own)

    def off(self, logprobs: Sequence[float]) -> Tensor:
        """Return how far each log-probability that was told is off."""
        return (torch.tensor(logprobs) - self.logprobs[: len(logprobs)]).abs()

    def to(self, other: "Measure") -> float:
        """Return the furthest that anything of this one lies from the other."""
        return max(float((self.gaps - other.gaps).abs().max()), float((self.logprobs - other.logprobs).abs().max()))


class Alone:
    """A base, and answers that are held against it."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.bank = Bank(base.model)
        self._stops = stop_ids(base.tokenizer, base.model.generation_config)

    def close(self) -> None:
        self.bank.detach()

    def judge(self, told: Told) -> Verdict:
        """Judge an answer by what its names meant, by what suits it best where they may have meant several things."""
        verdicts = []
        for route in told.routes:
            verdicts.append(self.by(told, route))
            if verdicts[-1].right:
                break
        return min(verdicts, key=lambda own: (own.wrong, own.ended_wrong))

    @torch.no_grad()
    def by(self, told: Told, route: Route) -> Verdict:
        """Judge an answer by a route."""
        verdict = Verdict(requests=1, tokens=len(told.tokens), ended_wrong=self._ended_wrong(told))
        if not told.tokens:
            return verdict
        with self._routed(route):
            measure = Measure.of(self._scores(told)[0], told)
            found = torch.cat([measure.gaps, off := measure.off(told.logprobs)])
            if BOUND < float(found.max()) <= FAR:
                moved = max(measure.to(Measure.of(scores, told)) for scores in self._shaken(told))
                verdict.shaken, verdict.bound = 1, BOUND + ROUNDING * moved
        verdict.wrong = int((~(found <= verdict.bound)).sum())
        forgiven = measure.gaps[(measure.gaps > 0) & (measure.gaps <= verdict.bound)].tolist()
        verdict.forgiven, verdict.worst = len(forgiven), max(forgiven, default=0.0)
        verdict.scored, verdict.off = len(off), max(off.tolist(), default=0.0)
        return verdict

    @contextmanager
    def _routed(self, route: Route) -> Iterator[None]:
        weights: dict[str, float] = {}
        folders: dict[str, Path] = {}
        for folder, weight in route:
            name = folder.name.replace("@", ".")
            weights[name] = weights.get(name, 0.0) + weight
            folders[name] = folder
        for name, folder in folders.items():
            self.bank.load(folder, name)
        try:
            with self.bank.route(weights or None):
                yield
        finally:
            for name in folders:
                self.bank.unload(name)

    def _scores(self, told: Told, rows: int = 1) -> Tensor:
        """Return the scores (rows, T, V) that each of the answer's tokens was chosen from."""
        tokens = torch.tensor([[*told.asked.prompt, *told.tokens]] * rows)
        return self.base.model(tokens, use_cache=False, logits_to_keep=len(told.tokens) + 1).logits[:, :-1].float()

    def _shaken(self, told: Told) -> Tensor:
        """Return such scores (SHAKES, T, V) from embeddings whose numbers are each one bit further up or down."""
        generator = torch.Generator().manual_seed(0)

        def shake(_: nn.Module, __: object, embedded: Tensor) -> Tensor:
            ways = torch.randint(0, 2, embedded.shape, generator=generator) * 2 - 1
            return torch.nextafter(embedded, ways * torch.inf)

        embeddings = self.base.model.get_input_embeddings()
        with embeddings.register_forward_hook(shake):
            return self._scores(told, SHAKES)

    def _ended_wrong(self, told: Told) -> bool:
        asked, tokens = told.asked, told.tokens
        stops = [at for at, token in enumerate(tokens) if token in self._stops and not asked.endless]
        if told.finish == "stop":
            return stops != [len(tokens) - 1]
        if told.finish == "length":
            return bool(stops) or len(tokens) != asked.answer
        return bool(stops[:-1]) or len(tokens) > asked.answer


@dataclass
class Judgement:
    """The verdict on all answers, and how many of those that were held against a wrong adapter did not fit it."""

    verdict: Verdict
    controls: int = 0
    apart: int = 0


def judged(base: Base, answers: Iterable[Told], others: Sequence[Path]) -> Judgement:
    """Judge all answers; some by one of these other adapters too."""
    alone, found, threads = Alone(base), Judgement(Verdict()), torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other are slower than one where somebody else computes too
    try:
        for number, told in enumerate(answers):
            found.verdict.add(alone.judge(told))
            if number % CONTROLS == 0 and told.tokens and told.asked.weights:
                own = {folder for route in told.routes for folder, _ in route}
                wrong = next(folder for folder in others if folder not in own)
                found.controls += 1
                found.apart += not alone.by(told, ((wrong, 1.0),)).right
    finally:
        torch.set_num_threads(threads)
        alone.close()
    return found


def _drawn(scores: Tensor, tokens: Sequence[int], temperature: float, seed: int) -> Tensor:
    """Return how far each number that a token was drawn by lies outside the token's share."""
    chance = random.Random(seed)
    ends = (scores / temperature).double().softmax(-1).cumsum(-1)
    gaps = []
    for end, token in zip(ends, tokens, strict=True):
        place = chance.random() * float(end[-1])
        begin = float(end[token - 1]) if token else 0.0
        gaps.append(max(begin - place, place - float(end[token]), 0.0))
    return torch.tensor(gaps)
