"""Judges answers: each token by one plain forward of its text through the request's own adapters, without the engine.

A token is judged after the tokens that were served before it, so that one that is forgiven does not excuse the next.
Greedy: it must be the likeliest. Sampled: the seed's next number must lie in the token's interval of the cumulative
probabilities. A difference beyond `BOUND` is compared with the effect of rounding on this very text, which is measured
with embeddings that are moved by their last bit.
"""

import random
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from benchmarks.soak.requests import Answer, Route
from loradeck import Bank, Base
from loradeck.base.text import stop_ids

BOUND = 1e-3  # of log-probabilities, and of the numbers that tokens are sampled by
LIMIT = 0.1  # a larger difference is wrong, whatever rounding does
SHAKES = 4  # times that an answer's embeddings are moved
ROUNDING = 4  # times the largest effect of that: each product rounds, not the embeddings alone
CONTROLS = 5  # one answer in CONTROLS is judged by a wrong adapter too


@dataclass
class Verdict:
    """What was found in answers."""

    requests: int = 0
    tokens: int = 0
    wrong: int = 0
    forgiven: int = 0
    worst: float = 0.0
    """The largest difference that was forgiven."""
    logprobs: int = 0
    """Tokens with a log-probability."""
    logprob_difference: float = 0.0
    """The largest difference of a log-probability."""
    shaken: int = 0
    """Answers with a difference beyond `BOUND`, which were compared with the effect of rounding."""
    bound: float = BOUND
    """The largest bound of an answer."""
    ended_wrong: int = 0
    """Answers that ended at the wrong token."""

    @property
    def right(self) -> bool:
        return not self.wrong and not self.ended_wrong

    def add(self, other: "Verdict") -> None:
        self.requests += other.requests
        self.tokens += other.tokens
        self.wrong += other.wrong
        self.forgiven += other.forgiven
        self.logprobs += other.logprobs
        self.shaken += other.shaken
        self.ended_wrong += other.ended_wrong
        self.worst = max(self.worst, other.worst)
        self.logprob_difference = max(self.logprob_difference, other.logprob_difference)
        self.bound = max(self.bound, other.bound)


@dataclass(frozen=True)
class Expectation:
    """How far each token of an answer is from the one expected, and its expected log-probability."""

    gaps: Tensor
    logprobs: Tensor

    @classmethod
    def of(cls, logits: Tensor, answer: Answer) -> Self:
        """Compare an answer with the logits (T, V) that each of its tokens was chosen from."""
        request, tokens = answer.request, torch.tensor(answer.tokens)[:, None]
        logprobs = logits.log_softmax(-1)
        expected = logprobs.gather(1, tokens)[:, 0]
        if request.temperature:
            return cls(_sampling_gaps(logits, answer.tokens, request.temperature, request.seed), expected)
        return cls(logprobs.max(-1).values - expected, expected)

    def logprob_differences(self, logprobs: Sequence[float]) -> Tensor:
        return (torch.tensor(logprobs) - self.logprobs[: len(logprobs)]).abs()

    def distance(self, other: "Expectation") -> float:
        """Return the largest difference of any gap or log-probability."""
        return max(float((self.gaps - other.gaps).abs().max()), float((self.logprobs - other.logprobs).abs().max()))


class Judge:
    """A base that answers are compared with."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.bank = Bank(base.model)
        self._stops = stop_ids(base.tokenizer, base.model.generation_config)

    def close(self) -> None:
        self.bank.detach()

    def judge(self, answer: Answer) -> Verdict:
        """Judge an answer by the route that suits it best, of those that its names can have resolved to."""
        verdicts = []
        for route in answer.routes:
            verdicts.append(self.judge_by(answer, route))
            if verdicts[-1].right:
                break
        return min(verdicts, key=lambda verdict: (verdict.wrong, verdict.ended_wrong))

    @torch.no_grad()
    def judge_by(self, answer: Answer, route: Route) -> Verdict:
        """Judge an answer by a route."""
        verdict = Verdict(requests=1, tokens=len(answer.tokens), ended_wrong=self._ended_wrong(answer))
        if not answer.tokens:
            return verdict
        with self._routed(route):
            expectation = Expectation.of(self._logits(answer)[0], answer)
            logprob_differences = expectation.logprob_differences(answer.logprobs)
            differences = torch.cat([expectation.gaps, logprob_differences])
            if BOUND < float(differences.max()) <= LIMIT:
                shaken = [Expectation.of(logits, answer) for logits in self._shaken_logits(answer)]
                verdict.shaken = 1
                verdict.bound = BOUND + ROUNDING * max(map(expectation.distance, shaken))
        verdict.wrong = int((~(differences <= verdict.bound)).sum())
        forgiven = expectation.gaps[(expectation.gaps > 0) & (expectation.gaps <= verdict.bound)].tolist()
        verdict.forgiven, verdict.worst = len(forgiven), max(forgiven, default=0.0)
        verdict.logprobs = len(logprob_differences)
        verdict.logprob_difference = max(logprob_differences.tolist(), default=0.0)
        return verdict

    @contextmanager
    def _routed(self, route: Route) -> Generator[None]:
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

    def _logits(self, answer: Answer, rows: int = 1) -> Tensor:
        """Return the logits (rows, T, V) that each of the answer's tokens is chosen from."""
        tokens = torch.tensor([[*answer.request.prompt, *answer.tokens]] * rows)
        return self.base.model(tokens, use_cache=False, logits_to_keep=len(answer.tokens) + 1).logits[:, :-1].float()

    def _shaken_logits(self, answer: Answer) -> Tensor:
        """Return such logits (SHAKES, T, V) from embeddings whose numbers are each moved by one bit."""
        generator = torch.Generator().manual_seed(0)

        def shake(_: nn.Module, __: object, embeddings: Tensor) -> Tensor:
            signs = torch.randint(0, 2, embeddings.shape, generator=generator) * 2 - 1
            return torch.nextafter(embeddings, signs * torch.inf)

        with self.base.model.get_input_embeddings().register_forward_hook(shake):
            return self._logits(answer, SHAKES)

    def _ended_wrong(self, answer: Answer) -> bool:
        request, tokens = answer.request, answer.tokens
        stops = [at for at, token in enumerate(tokens) if token in self._stops and not request.ignore_eos]
        if answer.finish == "stop":
            return stops != [len(tokens) - 1]
        if answer.finish == "length":
            return bool(stops) or len(tokens) != request.max_tokens
        return bool(stops[:-1]) or len(tokens) > request.max_tokens


@dataclass
class Judgement:
    """The verdict on all answers, and how many of those that were judged by a wrong adapter were found wrong."""

    verdict: Verdict
    controls: int = 0
    detected: int = 0


def judge_all(base: Base, answers: Iterable[Answer], others: Sequence[Path]) -> Judgement:
    """Judge all answers; some by one of these other adapters too."""
    judge, judgement, threads = Judge(base), Judgement(Verdict()), torch.get_num_threads()
    torch.set_num_threads(1)  # faster than two that wait for each other where other processes compute too
    try:
        for number, answer in enumerate(answers):
            judgement.verdict.add(judge.judge(answer))
            if number % CONTROLS == 0 and answer.tokens and answer.request.weights:
                folders = {folder for route in answer.routes for folder, _ in route}
                wrong = next(folder for folder in others if folder not in folders)
                judgement.controls += 1
                judgement.detected += not judge.judge_by(answer, ((wrong, 1.0),)).right
    finally:
        torch.set_num_threads(threads)
        judge.close()
    return judgement


def _sampling_gaps(logits: Tensor, tokens: Sequence[int], temperature: float, seed: int) -> Tensor:
    """Return how far each number that a token was sampled by lies outside the token's interval."""
    rng = random.Random(seed)
    cdf = (logits / temperature).double().softmax(-1).cumsum(-1)
    gaps = []
    for row, token in zip(cdf, tokens, strict=True):
        number = rng.random() * float(row[-1])
        low = float(row[token - 1]) if token else 0.0
        gaps.append(max(low - number, number - float(row[token]), 0.0))
    return torch.tensor(gaps)
