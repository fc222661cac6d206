"""Attention in C of sequences end to end: the definition's outputs and gradients, and each sequence's alone."""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loradeck.native import reference, varlen_attention
from loradeck.ops import compiler

from .conftest import AVX512

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BUILDS = {"native": "", "AVX2": "-mno-avx512f", "SSE2": "-mno-avx -mno-fma"}


@pytest.fixture(scope="module", params=BUILDS, autouse=True)
def build(request: pytest.FixtureRequest) -> Iterator[None]:
    """The library of each kind of machine that this one can be."""
    if varlen_attention.why_not_available() is not None:
        pytest.skip(f"attention in C {varlen_attention.why_not_available()}")
    if request.param != "native" and not AVX512:
        pytest.skip(f"{torch.backends.cpu.get_cpu_capability()}: the other builds are those of a machine with AVX-512")
    library = compiler.load(varlen_attention.SOURCE, BUILDS[request.param])
    library.loradeck_varlen_attention.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen_attention, "_library", lambda: library)
        yield


@dataclass(frozen=True)
class Case:
    lengths: Sequence[int]
    heads: int = 6
    key_heads: int = 2
    dim: int = 16
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Queries, keys, values and the gradient of the output; of the layout that models have."""
        rng, tokens = torch.Generator().manual_seed(len(self.lengths)), sum(self.lengths)
        counts = (self.heads, self.key_heads, self.key_heads, self.heads)
        drawn = (torch.randn(heads, tokens, self.dim, generator=rng).to(dtype).transpose(0, 1) for heads in counts)
        return [each.requires_grad_() for each in drawn]

    def results(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The output, and the gradients of queries, keys and values."""
        *inputs, upstream = inputs
        out = varlen_attention.varlen_attention(
            *inputs, self.lengths, scale=self.scale, window=self.window, softcap=self.softcap
        )
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    def definition(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The same by the definition, in float64."""
        *inputs, upstream = (each.detach().double().requires_grad_() for each in inputs)
        scale = self.scale or self.dim**-0.5
        sequences = zip(*(each.split(list(self.lengths)) for each in inputs), strict=True)
        out = torch.cat([reference.attend(*each, scale, self.softcap, self.window) for each in sequences])
        return [out, *torch.autograd.grad(out, inputs, upstream)]


def agrees(case: Case, dtype: torch.dtype = torch.float32) -> None:
    inputs = case.inputs(dtype)
    for result, exact in zip(case.results(inputs), case.definition(inputs), strict=True):
        assert result.dtype == dtype
        largest = max(1.0, exact.abs().max().item())  # the gradients of one token's scores are 0, of terms about 1
        assert (result.double() - exact).abs().max() <= DTYPES[dtype] * largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case([1]),
        Case([24, 25, 1, 23, 48]),
        Case([100, 7]),
        Case([30, 50], heads=4, key_heads=4),
        Case([30, 50], heads=5, key_heads=1, dim=80),
        Case([200, 90], window=17),
        Case([200, 90], window=64, softcap=2.0, dim=32),
        Case([40], softcap=0.5, scale=0.3),
        Case([600], heads=2, key_heads=1, dim=128),
    ],
    ids=str,
)
def test_it_is_the_definition(case: Case, dtype: torch.dtype) -> None:
    agrees(case, dtype)


@settings(deadline=None, max_examples=40)
@given(
    st.builds(
        Case,
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
        heads=st.sampled_from([2, 4]),
        key_heads=st.sampled_from([1, 2]),
        dim=st.sampled_from([16, 48, 64]),
        window=st.none() | st.integers(1, 80),
        softcap=st.none() | st.floats(0.25, 50),
    )
)
def test_it_is_the_definition_for_any_sizes(case: Case) -> None:
    agrees(case)


def test_a_sequence_has_the_same_bits_alone_and_on_any_number_of_threads() -> None:
    case = Case([70, 3, 41, 120])
    inputs = case.inputs()
    threads, outcomes = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            outcomes.append(case.results(inputs))
    finally:
        torch.set_num_threads(threads)
    starts = torch.tensor([0, *case.lengths]).cumsum(0).tolist()
    alone = [
        Case([length]).results([each[start : start + length] for each in inputs])
        for start, length in zip(starts, case.lengths, strict=False)
    ]
    outcomes.append([torch.cat(parts) for parts in zip(*alone, strict=True)])
    for outcome in outcomes[1:]:
        assert all(map(torch.equal, outcome, outcomes[0]))


def test_a_sequence_that_is_not_finite_changes_no_other() -> None:
    case = Case([30, 20, 40])
    inputs = case.inputs()
    before = case.results(inputs)
    broken = [each.detach().clone().index_fill_(0, torch.arange(30, 50), torch.nan).requires_grad_() for each in inputs]
    for one, other in zip(case.results(broken), before, strict=True):
        assert one[30:50].isnan().all()
        assert torch.equal(torch.cat([one[:30], one[50:]]), torch.cat([other[:30], other[50:]]))


def test_large_scores_do_not_overflow() -> None:
    case = Case([50], scale=1e4)
    (out, *gradients), exact = case.results(inputs := case.inputs()), case.definition(inputs)
    assert all(each.isfinite().all() for each in gradients)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-5)


def test_what_it_does_not_take() -> None:
    query, key, value, _ = (each.detach() for each in Case([4]).inputs())
    assert varlen_attention.takes(query, key, value)
    assert not varlen_attention.takes(query.double(), key.double(), value.double())
    assert not varlen_attention.takes(query, key.bfloat16(), value)
    assert not varlen_attention.takes(query[..., :8], key[..., :8], value[..., :8])
    assert not varlen_attention.takes(query[:, :3], key, value)
    assert not varlen_attention.takes(*(each.to("meta") for each in (query, key, value)))


def test_too_little_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([5])
    library = ctypes.CDLL(None)
    library.loradeck_varlen_attention = lambda *_: 1
    monkeypatch.setattr(varlen_attention, "_library", lambda: library)
    with pytest.raises(MemoryError, match="out of memory in attention; train on shorter examples"):
        case.results(case.inputs())
