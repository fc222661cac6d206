"""The sampler against transformers' own warpers; log-probabilities; random numbers of each sequence's own."""

from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loradeck.errors import ConfigError, RequestError
from loradeck.native import sampling as native
from loradeck.sampling import Adjustment, SamplingParams, Token, TokenSequence, next_tokens

V = 3000


@pytest.fixture(autouse=True, params=["C", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that chooses tokens."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_c", lambda _: None)
    elif native._c(torch.empty(0)) is None:
        pytest.skip("the C code is not usable on this machine")


def sequence(prompt: list[int] | None = None, stops: Iterable[int] = (), **sampling: Any) -> TokenSequence:
    return TokenSequence(prompt or [5, 6, 7], SamplingParams(**sampling), stop_ids=frozenset(stops))


def sample(logits: torch.Tensor, *sequences: TokenSequence) -> list[Token]:
    """The next token of each, from the same logits (V,)."""
    tokens = next_tokens(logits.expand(len(sequences), -1), sequences)
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
    assert sample(logits, sequence(logit_bias={third: 99.0}, stops=[best])) == [Token(third)]
    assert sample(logits, sequence(stops=[best])) == [Token(best, ends=True)]
    assert sample(logits, sequence(ignore_eos=True, stops=[best])) == [Token(best)]
    early = sequence(min_tokens=1, stop_token_ids=frozenset({second}), stops=[best])
    assert sample(logits, early) == [Token(third)]
    early.tokens.append(third)
    assert sample(logits, early) == [Token(best, ends=True)]


class ReadCounts(dict):
    """A mapping that counts how often it is read."""

    reads = 0

    def __iter__(self) -> Any:
        self.reads += 1
        return super().__iter__()

    def items(self) -> Any:
        self.reads += 1
        return super().items()

    def values(self) -> Any:
        self.reads += 1
        return super().values()


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_bias_is_read_once(logits: torch.Tensor) -> None:
    bias = ReadCounts(dict.fromkeys(range(V), 1.0))
    own = sequence(logit_bias=bias, temperature=1.0, seed=1)
    own.tokens.append(sample(logits, own)[0].id)
    reads = bias.reads
    for _ in range(3):
        own.tokens.append(sample(logits, own)[0].id)
    assert bias.reads == reads


@pytest.mark.parametrize(
    ("few", "many"),
    [
        ({"logit_bias": {1: 1.0}}, {"logit_bias": dict.fromkeys(range(V), 1.0)}),
        ({"min_tokens": 99, "stop_token_ids": {1}}, {"min_tokens": 99, "stop_token_ids": {*range(V - 1)}}),
    ],
)
def test_a_step_does_the_same_work_for_any_number_of_tokens(logits: torch.Tensor, few: dict, many: dict) -> None:
    counts = set()
    for sampling in (few, many):
        own = sequence(**sampling)
        own.tokens.append(sample(logits, own)[0].id)
        with Operations() as operations:
            sample(logits, own)
        counts.add(operations.count)
    assert len(counts) == 1


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_step_does_the_same_work_however_long_the_answer(logits: torch.Tensor, penalty: str) -> None:
    own = sequence([*range(500)], **{penalty: 1.5})
    counts = set()
    for _ in range(3):
        own.tokens.append(sample(logits, own)[0].id)
        with Operations() as operations:
            sample(logits, own)
        counts.add(operations.count)
        own.tokens += range(500, 900)
        sample(logits, own)
    assert len(counts) == 1


@given(data=st.data())
def test_bias_and_penalties_are_those_of_the_definition(data: st.DataObject) -> None:
    size, token = 12, st.integers(0, 11)
    prompt = data.draw(st.lists(token, min_size=1, max_size=8))
    penalty = st.sampled_from([0.0, 0.5, -1.25])
    sampling = SamplingParams(
        logit_bias=data.draw(st.dictionaries(token, st.sampled_from([-3.0, 0.25, 9.0]), max_size=4)),
        repetition_penalty=data.draw(st.sampled_from([1.0, 0.5, 2.0])),
        presence_penalty=data.draw(penalty),
        frequency_penalty=data.draw(penalty),
        min_tokens=data.draw(st.integers(0, 4)),
        stop_token_ids=data.draw(st.frozensets(token, max_size=3)),
    )
    own = TokenSequence(prompt, sampling, stop_ids=frozenset({2}))
    adjustment = None
    for step in range(6):
        logits = torch.randn(size, generator=torch.Generator().manual_seed(step)) * 3
        expected = logits.double()
        for key, bias in sampling.logit_bias.items():
            expected[key] += bias
        for key in {*own.tokens}:
            expected[key] *= sampling.repetition_penalty if expected[key] <= 0 else 1 / sampling.repetition_penalty
        for key, count in Counter(own.tokens[len(prompt) :]).items():
            expected[key] -= sampling.presence_penalty + count * sampling.frequency_penalty
        for key in sampling.stop_token_ids | {2} if step < sampling.min_tokens else ():
            expected[key] = float("-inf")
        adjustment = adjustment or Adjustment(own, logits)
        torch.testing.assert_close(adjustment.apply(logits, own).double(), expected, atol=1e-5, rtol=1e-5)
        own.tokens += data.draw(st.lists(token, min_size=1, max_size=1))


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
        tokens = next_tokens(tensors, sequences)
        assert [isinstance(token, RequestError) for token in tokens] == [False, True, True, False]
        assert tokens[0] == tokens[3] == Token(int(logits.argmax()))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 5e-324])
def test_a_temperature_close_to_0_takes_the_likeliest(logits: torch.Tensor, temperature: float) -> None:
    best = int(logits.argmax())
    for sampling in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert sample(logits, sequence(temperature=temperature, seed=1, **sampling)) == [Token(best)]


@pytest.mark.parametrize("cut", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_huge_temperature_takes_any_that_is_not_ruled_out(logits: torch.Tensor, cut: dict) -> None:
    kept = {3, 77, V - 1}
    bias = dict.fromkeys({*range(V)} - kept, float("-inf"))
    own = sequence(temperature=1e300, seed=1, logit_bias=bias, **cut)
    assert {sample(logits, own)[0].id for _ in range(60)} == kept


def test_an_error_of_all_is_each_ones(logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled again one by one, they would draw a second time from their seeds."""
    full = MemoryError("full")
    monkeypatch.setattr(native, "choose", Mock(side_effect=full))
    assert next_tokens(logits.expand(2, -1), [sequence(), sequence(temperature=1.0)]) == [full, full]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"logprobs": 1}])
def test_one_logit_that_is_nan_or_inf_is_enough(logits: torch.Tensor, value: float, sampling: dict) -> None:
    logits[7] = value
    assert isinstance(next_tokens(logits[None], [sequence(**sampling)])[0], RequestError)


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_token_is_chosen_if_all_are_ruled_out(temperature: float) -> None:
    own = sequence(logit_bias=dict.fromkeys(range(4), float("-inf")), temperature=temperature)
    (error,) = next_tokens(torch.zeros(1, 4), [own])
    assert "every token is ruled out" in str(error)


def test_an_error_is_its_sequences_own_and_the_others_draw_once(logits: torch.Tensor) -> None:
    """Sampled again one by one, the others would draw a second time from their seeds."""
    alone, beside = sequence(temperature=1.0, seed=5), sequence(temperature=1.0, seed=5)
    broken = sequence(min_tokens=1, stop_token_ids=frozenset({V + 5}))
    expected = [sample(logits, alone)[0] for _ in range(4)]
    tokens = []
    for _ in range(4):
        token, error = next_tokens(logits.expand(2, -1), [beside, broken])
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


def test_an_answer_cannot_need_more_tokens_than_it_may_have() -> None:
    assert SamplingParams(max_tokens=4, min_tokens=4).min_tokens == 4
    with pytest.raises(ConfigError, match="min_tokens is 5, and the answer may have at most 4 tokens"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_a_stop_string_may_be_given_alone() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 2.0, "top_k": 4, "seed": 3}])
def test_beyond_its_vocabulary_a_sequence_sees_nothing(logits: torch.Tensor, options: dict) -> None:
    """Whatever other rows of the step have there, and whatever size their vocabularies have."""
    whole = torch.cat([logits, torch.full((2,), 50.0)])
    sizes = [V, V + 1, V + 2, V]
    rows = [sequence(logprobs=5, logit_bias={V - 1: 1.0}, **options) for _ in sizes]
    for row, size in zip(rows, sizes, strict=True):
        row.vocabulary = size
    mixed = next_tokens(whole.expand(len(rows), -1), rows)
    for token, size in zip(mixed, sizes, strict=True):
        assert [token] == sample(whole[:size], sequence(logprobs=5, logit_bias={V - 1: 1.0}, **options))
        assert isinstance(token, Token)
        assert max(token.id, *(other for other, _ in token.top)) < size
    assert isinstance(mixed[2], Token)
    assert mixed[2].id >= V
