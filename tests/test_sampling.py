"""The sampler against transformers' own warpers; log-probabilities; random numbers of each sequence's own."""

from collections import Counter
from collections.abc import Iterable
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
from loradeck.sampling import Sampler, SamplingParams, Token, TokenSequence

V = 3000


def sequence(prompt: list[int] | None = None, **sampling: Any) -> TokenSequence:
    return TokenSequence(prompt or [5, 6, 7], SamplingParams(**sampling))


def sample(logits: torch.Tensor, *sequences: TokenSequence, stops: Iterable[int] = ()) -> list[Token]:
    """The next token of each, from the same logits (V,)."""
    tokens = Sampler(frozenset(stops)).sample(logits.expand(len(sequences), -1), sequences)
    assert all(isinstance(token, Token) for token in tokens)
    return tokens  # type: ignore[return-value]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.slow
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
def test_tokens_are_as_frequent_as_transformers_says(logits: torch.Tensor, sampling: dict, warpers: list) -> None:
    prompt = logits.topk(3).indices.tolist()
    warped = LogitsProcessorList(warpers)(torch.tensor([prompt]), logits[None].clone())[0].softmax(-1)
    drawn = 4000
    own = sequence(prompt, **{"temperature": 1.0, "seed": 3, **sampling})
    counts = Counter(sample(logits, own)[0].id for _ in range(drawn))
    assert all(warped[token] > 0 for token in counts)
    for token in warped.topk(12).indices.tolist():
        expected = float(warped[token]) * drawn
        assert abs(counts[token] - expected) <= 5 * max(1.0, expected) ** 0.5


def test_penalties_count_what_was_generated(logits: torch.Tensor) -> None:
    best, second = logits.topk(2).indices.tolist()
    gap = float(logits[best] - logits[second])
    own = sequence(presence_penalty=gap * 0.6, frequency_penalty=gap * 0.3)
    own.tokens.append(best)
    assert sample(logits, own)[0] == Token(best)  # 0.9 of the gap
    own.tokens.append(best)
    assert sample(logits, own)[0] == Token(second)  # 1.2 of it
    assert sample(logits, sequence([best] * 9, presence_penalty=99.0))[0] == Token(best)


def test_bias_and_early_stops(logits: torch.Tensor) -> None:
    best, second, third = logits.topk(3).indices.tolist()
    assert sample(logits, sequence(logit_bias={third: 99.0}), stops=[best]) == [Token(third)]
    assert sample(logits, sequence(), stops=[best]) == [Token(best, ends=True)]
    assert sample(logits, sequence(ignore_eos=True), stops=[best]) == [Token(best)]
    early = sequence(min_tokens=1, stop_token_ids=frozenset({second}))
    assert sample(logits, early, stops=[best]) == [Token(third)]
    early.tokens.append(third)
    assert sample(logits, early, stops=[best]) == [Token(best, ends=True)]


def test_random_numbers_are_a_sequences_own(logits: torch.Tensor) -> None:
    def drawn(count: int, **sampling: Any) -> list[int]:
        own = sequence(temperature=1.0, **sampling)
        others = [sequence(temperature=1.0, seed=i) for i in range(count)]
        return [sample(logits, *others, own)[-1].id for _ in range(8)]

    assert drawn(0, seed=7) == drawn(3, seed=7) == drawn(1, seed=7, top_p=1.0)
    assert drawn(0, seed=7) != drawn(0, seed=8)
    assert drawn(0) != drawn(0)


def test_log_probabilities_are_the_models_own(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    logprobs = logits.log_softmax(-1)
    own = sequence(temperature=0.3, logit_bias={9: 99.0}, logprobs=2, seed=1)
    token = sample(logits, own)[0]
    assert token.id == 9
    assert token.logprob == pytest.approx(float(logprobs[9]))
    assert token.top[0] == (best, pytest.approx(float(logprobs[best])))
    assert len(token.top) == 2


def test_nan_fails_its_own_sequence_alone(logits: torch.Tensor) -> None:
    nan = torch.full((V,), float("nan"))
    sequences = [sequence(), sequence(), sequence(temperature=1.0), sequence()]
    rows = [logits, nan, nan, logits]
    for tensors in (rows, torch.stack(rows)):
        tokens = Sampler(frozenset()).sample(tensors, sequences)
        assert [isinstance(token, RequestError) for token in tokens] == [False, True, True, False]
        assert tokens[0] == tokens[3] == Token(int(logits.argmax()))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 5e-324])
def test_a_temperature_close_to_0_takes_the_likeliest(logits: torch.Tensor, temperature: float) -> None:
    best = int(logits.argmax())
    for sampling in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert sample(logits, sequence(temperature=temperature, seed=1, **sampling)) == [Token(best)]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"logprobs": 1}])
def test_one_logit_that_is_nan_or_inf_is_enough(logits: torch.Tensor, value: float, sampling: dict) -> None:
    logits[7] = value
    assert isinstance(Sampler(frozenset()).sample(logits[None], [sequence(**sampling)])[0], RequestError)


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_token_is_chosen_if_all_are_ruled_out(temperature: float) -> None:
    own = sequence(logit_bias=dict.fromkeys(range(4), float("-inf")), temperature=temperature)
    (error,) = Sampler(frozenset()).sample(torch.zeros(1, 4), [own])
    assert "every token is ruled out" in str(error)


def test_an_error_is_its_sequences_own_and_the_others_draw_once(logits: torch.Tensor) -> None:
    """Sampled again one by one, the others would draw a second time from their seeds."""
    alone, beside = sequence(temperature=1.0, seed=5), sequence(temperature=1.0, seed=5)
    broken = sequence(min_tokens=1, stop_token_ids=frozenset({V + 5}))
    expected = [sample(logits, alone)[0] for _ in range(4)]
    tokens = []
    for _ in range(4):
        token, error = Sampler(frozenset()).sample(logits.expand(2, -1), [beside, broken])
        tokens.append(token)
        assert isinstance(error, IndexError)
    assert tokens == expected
    assert len({token.id for token in expected}) > 1


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2},
     {"max_tokens": -1}, {"repetition_penalty": 0}, {"presence_penalty": float("inf")}, {"logit_bias": {1: float("nan")}},
     {"logit_bias": {1: float("inf")}}, {"min_tokens": -1}, {"prompt_logprobs": -1}, {"frequency_penalty": float("nan")},
     {"logprobs": -1}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": [b"a"]}],
)  # fmt: skip
def test_numbers_out_of_their_bounds_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_a_stop_string_may_be_given_alone() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
