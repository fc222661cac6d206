"""Tokens and log-probabilities, in C and in torch, against the distribution in float64: in all builds."""

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loradeck.native import library, sampling
from loradeck.native.sampling import Choice, Row, choose_in_torch

INF, NAN = float("inf"), float("nan")
NEAR = 1e-5  # of a boundary between two tokens, in shares of the whole: float32 may fall on either side
SIZES = (1, 3, 63, 64, 65, 200, 1000, 5000)
Chooser = Callable[[Sequence[Row]], list[Choice]]


@pytest.fixture(scope="module")
def choose(compiled: ctypes.CDLL) -> Chooser:
    """A build's own choice."""
    return lambda rows: sampling.choose_in_c(compiled, rows)


def random(size: int, seed: int, scale: float = 3.0, levels: int = 0) -> Tensor:
    """Return logits (size,); of `levels` different ones, if so many are given."""
    rng = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, (size,), generator=rng).float() * scale
    return torch.randn(size, generator=rng) * scale


def possible(row: Row) -> set[int]:
    """Return the tokens whose share of the kept ones in float64 has u in it, or nearly."""
    logits = (row.logits if row.adjusted is None else row.adjusted).double()
    if not row.temperature:
        return {int(logits.argmax())}
    weights = ((logits - logits.max()) / row.temperature).exp()
    tokens = set()
    for near in (-NEAR, 0, NEAR):
        order = logits.sort(descending=True, stable=True).indices if row.cut else torch.arange(len(weights))
        if row.top_k:
            order = order[: row.top_k]
        shares = weights[order]
        before = shares.cumsum(0) - shares
        out = before >= (row.top_p + near) * shares.sum() if row.top_p < 1 else before < 0
        out |= shares < row.min_p * (1 + near)
        out[0] = out[0] & (not row.cut)
        shares = shares[~out]
        ends = shares.cumsum(0) / shares.sum()
        inside = (ends - shares / shares.sum() - NEAR <= row.u) & (row.u <= ends + NEAR) & (shares > 0)
        tokens |= {*order[~out][inside].tolist()}
    return tokens


@st.composite
def rows(draw: Any, size: int | None = None) -> Row:
    size = size or draw(st.sampled_from(SIZES))
    vectors = st.builds(
        random, st.just(size), st.integers(0, 99), st.sampled_from([0.01, 1.0, 3.0, 10.0]), st.sampled_from([0, 0, 5])
    )
    logits = draw(vectors)
    ruled_out = draw(st.sampled_from([0, 0, size // 3]))
    logits[:ruled_out] = -INF
    return Row(
        logits,
        draw(st.none() | vectors),
        draw(st.sampled_from([0.0, 1e-5, 0.3, 0.8, 1.0, 2.5, 1e30])),
        draw(st.sampled_from([0, 0, 1, 5, 70, 600, size, 10**30])),
        draw(st.sampled_from([1.0, 1.0, 0.01, 0.5, 0.95, 0.9999])),
        draw(st.sampled_from([0.0, 0.0, 0.05, 0.9, 1.0])),
        draw(st.sampled_from([0.0, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True)),
        draw(st.sampled_from([None, 0, 1, 6, 100, size])),
    )  # fmt: skip


@settings(max_examples=150)
@given(row=rows())
def test_the_token_is_the_one_at_u(choose: Chooser, row: Row) -> None:
    (choice,) = choose([row])
    assert choice.token in possible(row)
    assert choice.largest == row.logits.max()
    assert choice.best == (row.logits if row.adjusted is None else row.adjusted).max()


@settings(max_examples=150)
@given(row=rows())
def test_log_probabilities(choose: Chooser, row: Row) -> None:
    (choice,) = choose([row])
    if row.logprobs is None:
        assert choice[3:] == (None, ())
        return
    logprobs = row.logits.double().log_softmax(0)
    assert choice.logprob == pytest.approx(float(logprobs[choice.token]), abs=1e-5, rel=1e-6)
    order = logprobs.sort(descending=True, stable=True).indices[: row.logprobs].tolist()
    assert [token for token, _ in choice.top] == order  # equal ones by id
    assert [logprob for _, logprob in choice.top] == pytest.approx(logprobs[order].tolist(), abs=1e-5, rel=1e-6)


@given(row=rows())
def test_the_definition_is_the_same(row: Row) -> None:
    (choice,) = choose_in_torch([row])
    logits = row.logits if row.adjusted is None else row.adjusted
    assert logits[choice.token] in logits[[*possible(row)]]  # any of equal ones


@settings(max_examples=50)
@given(data=st.data())
def test_a_rows_bits_are_its_own(choose: Chooser, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(SIZES))
    some = data.draw(st.lists(rows(size), min_size=2, max_size=12))
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(2, 5)))
    try:
        beside = choose(some)
    finally:
        torch.set_num_threads(before)
    assert beside == [choice for row in some for choice in choose([row])]


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_finite_is_said_of_its_own_row(choose: Chooser, number: float, size: int) -> None:
    broken = random(size, 1)
    if number == -INF:
        broken[:] = number
    else:
        broken[size // 2] = number
    some = [
        Row(logits, None, temperature, u=0.5, logprobs=2)
        for logits in (random(size, 0), broken)
        for temperature in (0, 1)
    ]
    sound, also_sound, *others = choose(some)
    assert [sound, also_sound] == choose(some[:2])
    for choice in others:
        assert math.isnan(choice.largest) if math.isnan(number) else choice.largest == number


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_adjusted_logits_that_are_not_finite(choose: Chooser, temperature: float, cut: dict[str, float]) -> None:
    logits = random(100, 0)
    ruled_out, forced, lost = logits - INF, logits.clone(), logits.clone()
    forced[7], lost[7] = INF, NAN
    some = [Row(logits, adjusted, temperature, u=0.5, logprobs=1, **cut) for adjusted in (ruled_out, forced, lost)]
    none, token, nan = choose(some)
    assert none.best == -INF
    assert (token.token, token.best) == (7, INF)
    assert math.isnan(nan.best)


@pytest.mark.parametrize("size", [1, 63, 100])
def test_nothing_is_read_beyond_the_last_token(choose: Chooser, size: int) -> None:
    wide = torch.full((3, size + 30), NAN)
    wide[:, :size] = random(3 * size, 0).view(3, size)
    for more in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}):
        views, copies = (
            [Row(row, u=0.6, logprobs=3, **more) for row in each] for each in (wide[:, :size], wide[:, :size].clone())
        )
        assert choose(views) == choose(copies)


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("more", [{"top_p": 0.999}, {"top_k": 3000}, {"min_p": 1e-9}, {}])
def test_a_large_vocabulary_that_is_flat(choose: Chooser, levels: int, more: dict[str, float]) -> None:
    row = Row(random(262_144, 5, 0.5, levels), None, 1.0, u=0.987654321, logprobs=20, **more)
    (choice,) = choose([row])
    assert choice.token in possible(row)
    top = row.logits.sort(descending=True, stable=True).indices[:20].tolist()
    assert [token for token, _ in choice.top] == top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_scored_as_log_softmax_does(
    compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    logits = random(7 * 300, 3).view(7, 300).to(dtype)
    tokens = [5, 0, 299, 5, 17, 100, 1]
    exact = logits.double().log_softmax(-1)
    for code in (compiled, None):
        monkeypatch.setattr(sampling, "_c", lambda _, code=code: code)
        choices = sampling.score(logits, tokens, 4)
        assert [choice.token for choice in choices] == tokens
        assert [choice.logprob for choice in choices] == pytest.approx(
            [float(row[token]) for row, token in zip(exact, tokens, strict=True)], abs=1e-5
        )
        for choice, row in zip(choices, exact, strict=True):
            assert [logprob for _, logprob in choice.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-5)
        for token in (-1, 300):
            with pytest.raises(IndexError, match="300"):
                sampling.score(logits, [*tokens[:-1], token], 4)


def test_code_that_is_wrong_is_not_used(
    choose: Chooser, compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sampling._usable.__wrapped__(compiled) is compiled
    right = sampling.choose_in_c
    for wrong in (
        lambda *_: [choice._replace(token=choice.token ^ 1) for choice in right(*_)],
        lambda *_: [choice._replace(logprob=choice.logprob + 1e-3) for choice in right(*_)],
    ):
        monkeypatch.setattr(sampling, "choose_in_c", wrong)
        assert sampling._usable.__wrapped__(compiled) is None


def test_without_a_compiler_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> ctypes.CDLL:
        raise OSError("no C compiler")

    monkeypatch.setattr(sampling, "latest", lambda: None)
    monkeypatch.setattr(sampling, "any_library", fail)
    sampling._usable.cache_clear()
    logits = random(50, 0)
    assert sampling.choose([Row(logits)]) == choose_in_torch([Row(logits)])
    sampling._usable.cache_clear()


def test_out_of_memory_is_an_error() -> None:
    class Full:
        loradeck_sample = staticmethod(lambda *_: 1)

    with pytest.raises(MemoryError):
        sampling.choose_in_c(Full(), [Row(random(5, 0))])  # type: ignore[arg-type]


def test_the_library_that_was_loaded_last_is_used(compiled: ctypes.CDLL) -> None:
    assert library.latest() is compiled
