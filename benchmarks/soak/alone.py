"""What a request gets alone: one plain forward of its text through its own adapters, no engine in it.

Each token is judged where the tokens before it are those that were served, so that one that is forgiven does not
excuse those after it. Greedy: it is the likeliest. Drawn: the seed's next number lies in its share of the
probabilities, which are put end to end.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.soak.asked import Route, Told
from loradeck import Bank, Base
from loradeck.base.text import stop_ids

BOUND = 1e-3  # of log-probabilities, and of the numbers that tokens are drawn by
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
    ended_wrong: int = 0
    """Answers that ended where they should not have."""

    @property
    def right(self) -> bool:
        return not self.wrong and not self.ended_wrong

    def add(self, other: "Verdict") -> None:
        self.requests += other.requests
        self.tokens += other.tokens
        self.wrong += other.wrong
        self.forgiven += other.forgiven
        self.scored += other.scored
        self.ended_wrong += other.ended_wrong
        self.worst = max(self.worst, other.worst)
        self.off = max(self.off, other.off)


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

    def by(self, told: Told, route: Route) -> Verdict:
        """Judge an answer by a route."""
        asked, tokens = told.asked, [*told.tokens]
        verdict = Verdict(requests=1, tokens=len(tokens), ended_wrong=self._ended_wrong(told))
        if not tokens:
            return verdict
        scores = self._scores([*asked.prompt, *tokens], route, len(tokens) + 1)[:-1]
        logprobs = scores.log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gaps = _drawn(scores, tokens, asked.temperature, asked.seed) if asked.temperature else _behind(logprobs, own)
        verdict.wrong = sum(not gap <= BOUND for gap in gaps)
        verdict.forgiven = sum(0 < gap <= BOUND for gap in gaps)
        verdict.worst = max((gap for gap in gaps if gap <= BOUND), default=0.0)
        for told_logprob, expected in zip(told.logprobs, own.tolist(), strict=False):
            off = abs(told_logprob - expected)
            verdict.scored += 1
            verdict.off = max(verdict.off, off)
            verdict.wrong += not off <= BOUND
        return verdict

    @torch.no_grad()
    def _scores(self, tokens: Sequence[int], route: Route, last: int) -> Tensor:
        """Return the scores (T, V) of what follows each of the last tokens."""
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
                return self.base.model(torch.tensor([tokens]), use_cache=False, logits_to_keep=last).logits[0].float()
        finally:
            for name in folders:
                self.bank.unload(name)

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


def _behind(logprobs: Tensor, own: Tensor) -> list[float]:
    return (logprobs.max(-1).values - own).tolist()


def _drawn(scores: Tensor, tokens: Sequence[int], temperature: float, seed: int) -> list[float]:
    """Return how far each number that a token was drawn by lies outside the token's share."""
    chance = random.Random(seed)
    ends = (scores / temperature).double().softmax(-1).cumsum(-1)
    gaps = []
    for end, token in zip(ends, tokens, strict=True):
        place = chance.random() * float(end[-1])
        begin = float(end[token - 1]) if token else 0.0
        gaps.append(max(begin - place, place - float(end[token]), 0.0))
    return gaps
