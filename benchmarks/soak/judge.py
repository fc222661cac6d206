"""Judges answers: each is computed again alone, in one step, and must have the same bits.

The runner is a new one: no prefix cache, no other rows, all tokens of the text at once. A request's bits do not depend
on these (docs/invariants.md), so nothing is forgiven: each token must be the one that the sampler chooses from these
logits, and each log-probability the same number.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.soak.requests import Answer, Route
from loradeck import AdapterStore, Base
from loradeck.base.text import stop_ids
from loradeck.base.weights import shared_copy
from loradeck.native.pages import PAGE
from loradeck.runner.choice import runner_of
from loradeck.runner.native_runner import NativeRunner
from loradeck.runner.request import Request, Scheduled
from loradeck.sampling import SamplingParams, TokenSequence, next_tokens

CONTROLS = 5  # one answer in CONTROLS is judged by a wrong adapter too


@dataclass
class Verdict:
    """What was found in answers."""

    requests: int = 0
    tokens: int = 0
    wrong: int = 0
    """Tokens that differ, in themselves or in their log-probability."""
    logprobs: int = 0
    """Tokens with a log-probability."""
    ended_wrong: int = 0
    """Answers that ended at the wrong token."""

    @property
    def right(self) -> bool:
        return not self.wrong and not self.ended_wrong

    def add(self, other: "Verdict") -> None:
        self.requests += other.requests
        self.tokens += other.tokens
        self.wrong += other.wrong
        self.logprobs += other.logprobs
        self.ended_wrong += other.ended_wrong


class Judge:
    """A runner by which answers are computed again."""

    def __init__(self, base: Base, store: AdapterStore) -> None:
        """`store` has the adapters.

        Raises:
            RuntimeError: this machine cannot compute the base by the compiled step; the log says why.
        """
        runner = runner_of(shared_copy(base.model))
        if not isinstance(runner, NativeRunner):
            raise RuntimeError("answers have the same bits alone only where the compiled step computes them")
        self._runner, self._store = runner, store
        self._stop_ids = stop_ids(base.tokenizer, base.model.generation_config)

    def judge(self, answer: Answer) -> Verdict:
        """Judge an answer by the route that suits it best, of those that its names can have resolved to."""
        verdicts = []
        for route in answer.routes:
            if not all(folder.is_dir() for folder, _ in route):  # of a version that was refused
                continue
            verdicts.append(self.judge_by(answer, route))
            if verdicts[-1].right:
                break
        return min(verdicts, key=lambda verdict: (verdict.wrong, verdict.ended_wrong))

    def judge_by(self, answer: Answer, route: Route) -> Verdict:
        """Judge an answer by a route."""
        verdict = Verdict(1, len(answer.tokens), logprobs=len(answer.logprobs))
        sequence = TokenSequence(answer.request.prompt, answer.request.sampling, stop_ids=self._stop_ids)
        ends = []
        for index, logits in enumerate(self._logits(answer, route) if answer.tokens else ()):
            (token,) = next_tokens([logits], [sequence])
            if isinstance(token, Exception):
                raise token
            served, logprob = answer.tokens[index], answer.logprobs[index] if answer.logprobs else None
            verdict.wrong += (token.id, token.logprob) != (served, logprob)
            sequence.tokens.append(served)
            ends.append(token.ends)
        verdict.ended_wrong = _ended_wrong(answer, ends)
        return verdict

    def _logits(self, answer: Answer, route: Route) -> Tensor:
        """Return the logits (T, V) that each of the answer's T tokens is chosen from."""
        runner, weights = self._runner, dict[str, float]()
        for folder, weight in route:
            sha256 = self._store.find(folder.name).sha256()
            if sha256 not in weights:
                runner.bank.load(folder, sha256)
            weights[sha256] = weights.get(sha256, 0.0) + weight
        prompt = answer.request.prompt
        every = SamplingParams(prompt_logprobs=0)  # logits of all tokens, not of the last alone
        request = Request([*prompt, *answer.tokens[:-1]], every, tuple(sorted(weights.items())))
        count = request.pending
        cache = runner.new_cache(runner.token_bytes * (count + PAGE))
        assert cache.reserve(request, count)
        (logits,) = runner.run([Scheduled(request, count)], cache)
        for sha256 in weights:
            runner.bank.unload(sha256)
        return logits[len(prompt) - 1 :]


def _ended_wrong(answer: Answer, ends: Sequence[bool]) -> bool:
    """Say whether an answer should have ended elsewhere; `ends` says which of its tokens are stop tokens."""
    if answer.finish == "stop":
        return not any(ends[-1:]) or any(ends[:-1])
    if answer.finish == "length":
        return any(ends) or len(ends) != answer.request.max_tokens
    return any(ends[:-1]) or len(ends) > answer.request.max_tokens


@dataclass
class Judgement:
    """The verdict on all answers, and how many of those that were judged by a wrong adapter were found wrong."""

    verdict: Verdict
    controls: int = 0
    detected: int = 0


def judge_all(base: Base, store: AdapterStore, answers: Iterable[Answer], others: Sequence[Path]) -> Judgement:
    """Judge all answers; some by one of these other adapters of the store too."""
    judge, judgement = Judge(base, store), Judgement(Verdict())
    for number, answer in enumerate(answers):
        judgement.verdict.add(judge.judge(answer))
        if number % CONTROLS == 0 and answer.tokens and answer.request.weights:
            folders = {folder for route in answer.routes for folder, _ in route}
            wrong = next(folder for folder in others if folder not in folders)
            judgement.controls += 1
            judgement.detected += not judge.judge_by(answer, ((wrong, 1.0),)).right
    return judgement
