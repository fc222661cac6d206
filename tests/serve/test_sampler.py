"""Which token is chosen, held against transformers' own warpers; log-probabilities; chance of a request's own."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loradeck.errors import ConfigError, RequestError
from loradeck.serve.request import Request, SamplingParams, Scheduled, Token
from loradeck.serve.sampler import Sampler

V = 3000


def request(prompt: list[int] | None = None, **sampling: Any) -> Request:
    own = prompt or [5, 6, 7]
    return Request("r", [*own], len(own), (), SamplingParams(**sampling))


def choose(sampler: Sampler, scores: torch.Tensor, *requests: Request) -> list[Token | None]:
    return [
        choice.token
        for choice in sampler.choose([scores[None]] * len(requests), [Scheduled(r, r.pending) for r in requests])
    ]


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.4}, [TopPLogitsWarper(0.4)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"top_k": 50, "top_p": 0.6}, [TopKLogitsWarper(50), TopPLogitsWarper(0.6)]),
        ({"temperature": 1.5, "top_k": 40, "min_p": 0.1}, [TemperatureLogitsWarper(1.5), TopKLogitsWarper(40), MinPLogitsWarper(0.1)]),
        ({"repetition_penalty": 1.8, "temperature": 0.5}, [RepetitionPenaltyLogitsProcessor(1.8), TemperatureLogitsWarper(0.5)]),
    ],
)  # fmt: skip
def test_tokens_come_as_often_as_transformers_says(scores: torch.Tensor, sampling: dict, warpers: list) -> None:
    prompt = scores.topk(3).indices.tolist()
    warped = LogitsProcessorList(warpers)(torch.tensor([prompt]), scores[None].clone())[0].softmax(-1)
    sampler, drawn = Sampler(frozenset()), 4000
    own = request(prompt, **{"temperature": 1.0, "seed": 3, **sampling})
    counts = Counter(token.id for _ in range(drawn) if (token := choose(sampler, scores, own)[0]))
    assert all(warped[token] > 0 for token in counts)
    for token in warped.topk(12).indices.tolist():
        expected = float(warped[token]) * drawn
        assert abs(counts[token] - expected) <= 5 * max(1.0, expected) ** 0.5


def test_penalties_count_what_was_generated(scores: torch.Tensor) -> None:
    best, second = scores.topk(2).indices.tolist()
    gap = float(scores[best] - scores[second])
    own = request(presence_penalty=gap * 0.6, frequency_penalty=gap * 0.3)
    sampler = Sampler(frozenset())
    own.tokens.append(best)
    assert choose(sampler, scores, own)[0] == Token(best)  # 0.9 of the gap
    own.tokens.append(best)
    assert choose(sampler, scores, own)[0] == Token(second)  # 1.2 of it
    assert choose(sampler, scores, request([best] * 9, presence_penalty=99.0))[0] == Token(best)


def test_bias_and_early_stops(scores: torch.Tensor) -> None:
    best, second, third = scores.topk(3).indices.tolist()
    sampler = Sampler(frozenset({best}))
    assert choose(sampler, scores, request(logit_bias={third: 99.0}))[0] == Token(third)
    assert choose(sampler, scores, request())[0] == Token(best, ends=True)
    assert choose(sampler, scores, request(ignore_eos=True))[0] == Token(best)
    early = request(min_tokens=1, stop_tokens=frozenset({second}))
    assert choose(sampler, scores, early)[0] == Token(third)
    early.tokens.append(third)
    assert choose(sampler, scores, early)[0] == Token(best, ends=True)


def test_chance_is_a_requests_own(scores: torch.Tensor) -> None:
    def drawn(count: int, **sampling: Any) -> list[int]:
        sampler, own = Sampler(frozenset()), request(temperature=1.0, **sampling)
        others = [request(temperature=1.0, seed=i) for i in range(count)]
        return [token.id for _ in range(8) if (token := choose(sampler, scores, *others, own)[-1])]

    assert drawn(0, seed=7) == drawn(3, seed=7) == drawn(1, seed=7, top_p=1.0)
    assert drawn(0, seed=7) != drawn(0, seed=8)
    assert drawn(0) != drawn(0)


def test_log_probabilities_are_the_models_own(scores: torch.Tensor) -> None:
    best = int(scores.argmax())
    logprobs = scores.log_softmax(-1)
    own = request(temperature=0.3, logit_bias={9: 99.0}, logprobs=2, seed=1)
    token = choose(Sampler(frozenset()), scores, own)[0]
    assert token is not None
    assert token.id == 9
    assert token.logprob == pytest.approx(float(logprobs[9]))
    assert token.top[0] == (best, pytest.approx(float(logprobs[best])))
    assert len(token.top) == 2


def test_a_prompts_log_probabilities_come_in_chunks() -> None:
    own = request([5, 6, 7, 8], max_tokens=0, prompt_logprobs=1)
    rows = torch.randn(4, V)
    sampler, told = Sampler(frozenset()), []
    for start, stop in ((0, 3), (3, 4)):
        work = Scheduled(own, stop - start)
        told += sampler.choose([rows[start:stop][-work.scored or stop :]], [work])[0].prompt
        own.computed = stop
    assert [token.id for token in told] == [5, 6, 7, 8]
    assert told[0].logprob is None
    expected = [float(rows[i].log_softmax(-1)[token]) for i, token in enumerate([6, 7, 8])]
    assert [token.logprob for token in told[1:]] == pytest.approx(expected)


def test_a_request_whose_scores_are_no_numbers_fails_alone(scores: torch.Tensor) -> None:
    broken = torch.full((1, V), float("nan"))
    works = [Scheduled(own, 3) for own in (request(), request(), request(temperature=1.0), request())]
    choices = Sampler(frozenset()).choose([scores[None], broken, broken, scores[None]], works)
    assert [isinstance(choice.error, RequestError) for choice in choices] == [False, True, True, False]
    assert choices[0].token == choices[3].token == Token(int(scores.argmax()))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 5e-324])
def test_a_temperature_close_to_0_takes_the_likeliest(scores: torch.Tensor, temperature: float) -> None:
    best = int(scores.argmax())
    for sampling in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        own = request(temperature=temperature, seed=1, **sampling)
        assert choose(Sampler(frozenset()), scores, own) == [Token(best)]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"logprobs": 1}])
def test_one_score_that_is_no_number_is_enough(scores: torch.Tensor, value: float, sampling: dict) -> None:
    scores[7] = value
    work = Scheduled(request(**sampling), 3)
    assert isinstance(Sampler(frozenset()).choose([scores[None]], [work])[0].error, RequestError)


@pytest.mark.parametrize("temperature", [0, 1])
def test_where_every_token_is_ruled_out_none_is_chosen(temperature: float) -> None:
    own = request(logit_bias=dict.fromkeys(range(4), float("-inf")), temperature=temperature)
    choice = Sampler(frozenset()).choose([torch.zeros(1, 4)], [Scheduled(own, 3)])[0]
    assert "every token is ruled out" in str(choice.error)


def test_a_request_that_breaks_the_choice_fails_alone_and_chance_goes_on(scores: torch.Tensor) -> None:
    """Chosen again one by one, the others would draw a second time from their seeds."""
    alone, beside = Sampler(frozenset()), Sampler(frozenset())
    hot, again = request(temperature=1.0, seed=5), request(temperature=1.0, seed=5)
    broken = request(min_tokens=1, stop_tokens=frozenset({V + 5}))
    expected = [choose(alone, scores, hot)[0] for _ in range(4)]
    found = []
    for _ in range(4):
        choices = beside.choose([scores[None]] * 2, [Scheduled(again, 3), Scheduled(broken, 3)])
        found.append(choices[0].token)
        assert isinstance(choices[1].error, RequestError)
    assert found == expected
    assert len({token.id for token in expected if token}) > 1


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2},
     {"max_tokens": -1}, {"repetition_penalty": 0}, {"presence_penalty": float("inf")}, {"logit_bias": {1: float("nan")}},
     {"logit_bias": {1: float("inf")}}, {"min_tokens": -1}, {"prompt_logprobs": -1}, {"frequency_penalty": float("nan")},
     {"logprobs": -1}],
)  # fmt: skip
def test_numbers_out_of_their_bounds_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingParams(**wrong)
