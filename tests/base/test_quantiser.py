"""Weights as blocks of GGUF files: gguf's own reader decodes them, and their error is small."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loradeck.base import quantiser
from loradeck.base.quantiser import ENCODERS, quantise
from loradeck.errors import BaseModelError
from loradeck.native.quantised import KINDS

gguf = pytest.importorskip("gguf", reason="needs pip install gguf")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The error as a share of gguf's own quantiser's, at most; gguf has none for Q4_K.
SHARES = {"Q4_0": 0.96, "Q4_1": 0.9, "Q5_0": 0.98, "Q5_1": 0.94, "Q8_0": 1.0}
STEPS = {"Q4_0": 6, "Q4_1": 6, "Q4_K": 5, "Q5_0": 13, "Q5_1": 13, "Q8_0": 127}  # in the largest value, at least
BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q4_K": 4.5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5}


def weights(rows: int = 64, inputs: int = 512, seed: int = 0) -> Tensor:
    """Normal weights whose outputs differ in size, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, rows)[:, None]
    return torch.randn(rows, inputs, generator=generator) * sizes


def decoded(data: Tensor, kind: str) -> Tensor:
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]).copy())


def error(weight: Tensor, kind: str) -> float:
    """The root of the mean squared error, as a share of each row's."""
    off = decoded(quantise(weight, kind, "w"), kind) - weight
    return float((off.norm(dim=1) / weight.norm(dim=1)).mean())


@pytest.mark.parametrize("kind", ENCODERS)
def test_rows_have_the_bytes_of_a_file(kind: str) -> None:
    data = quantise(weights(rows=5), kind, "w")
    assert data.dtype == torch.uint8
    assert data.shape == gguf.quant_shape_to_byte_shape((5, 512), gguf.GGMLQuantizationType[kind])
    assert data.shape[1] * 8 == BITS[kind] * 512


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_q8_0_is_gguf_s_own_to_the_byte(dtype: torch.dtype) -> None:
    weight = weights().to(dtype)
    weight[0, :64] = torch.arange(64) / 2  # halves, which gguf rounds away from zero
    weight[0, 63] = 127
    expected = gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(quantise(weight, "Q8_0", "w").numpy(), expected)


@pytest.mark.parametrize("kind", SHARES)
def test_the_error_is_at_most_a_share_of_gguf_s_own(kind: str) -> None:
    weight = weights()
    number = gguf.GGMLQuantizationType[kind]
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), number), number))
    expected = float(((theirs - weight).norm(dim=1) / weight.norm(dim=1)).mean())
    assert error(weight, kind) <= SHARES[kind] * expected


def test_q4_k_is_nearly_as_exact_as_q4_1_in_fewer_bits() -> None:
    assert error(weights(), "Q4_K") < 1.03 * error(weights(), "Q4_1")


@given(st.integers(0, 2**32), st.sampled_from([*ENCODERS]), st.floats(-4, 4), st.floats(-3, 3))
def test_no_value_is_further_off_than_a_step(seed: int, kind: str, offset: float, size: float) -> None:
    """Whatever the offset of a group, all positive or all negative ones among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(3, 512, generator=generator) + offset) * 10**size
    values = decoded(quantise(weight, kind, "w"), kind)
    assert bool(values.isfinite().all())
    step = weight.abs().amax(1, keepdim=True) / STEPS[kind]
    assert bool(((values - weight).abs() <= step).all())


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.7, -123.4, 1e-4, 1e-12, -1e-42])
def test_groups_of_one_value_keep_it(kind: str, value: float) -> None:
    values = decoded(quantise(torch.full((2, 512), value), kind, "w"), kind)
    assert float((values - value).abs().max()) <= max(abs(value) / 50, 1e-7)  # as exact as float16 scales are


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_group_of_zeros_beside_others_stays_zero(kind: str) -> None:
    weight = weights()
    weight[:, 64:96] = 0
    assert not decoded(quantise(weight, kind, "w"), kind)[:, 64:96].any()


def test_a_large_offset_is_no_obstacle() -> None:
    """The low value is rounded to float16, and the codes are those of the rounded one."""
    weight = 1000 + torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) / 10
    assert float((decoded(quantise(weight, "Q4_1", "w"), "Q4_1") - weight).abs().max()) < 0.4


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name(kind: str, value: float) -> None:
    weight = weights()
    weight[40, 7] = value
    with pytest.raises(BaseModelError, match=r"layers\.3\.down has values that are NaN or Inf"):
        quantise(weight, kind, "layers.3.down")


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("value", [1e9, -1e9, 3e38])
def test_what_is_beyond_float16_s_range_is_refused_by_name(kind: str, value: float) -> None:
    weight = weights()
    weight[40, 7] = value
    with pytest.raises(BaseModelError, match=rf"layers\.3\.down has values beyond the range of {kind}"):
        quantise(weight, kind, "layers.3.down")


@pytest.mark.parametrize("kind", ENCODERS)
def test_threads_and_strides_change_no_bit(kind: str, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiser, "PART", 6 * 512)
    weight = weights(rows=33)
    alone = quantise(weight, kind, "w")
    torch.set_num_threads(2)
    assert torch.equal(quantise(weight, kind, "w"), alone)
    assert torch.equal(quantise(weight.T.contiguous().T, kind, "w"), alone)


def test_a_weight_without_outputs_has_no_bytes() -> None:
    assert quantise(torch.empty(0, 512), "Q4_K", "w").shape == (0, 288)


def test_every_kind_is_one_that_the_step_reads() -> None:
    assert ENCODERS.keys() <= KINDS.keys()
