"""int8 weights: their error, and that all else is as in the plain layers."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from loradeck.base import matmul, quantised
from loradeck.base.quantised import FEW, TOLERANCE, QuantisedEmbedding, QuantisedLinear, quantise
from loradeck.base.weights import prepare
from loradeck.errors import UnsupportedError

DTYPES = [torch.float32, torch.bfloat16]
RNG = torch.Generator().manual_seed(5)


def layer(inside: int, outside: int, dtype: torch.dtype = torch.float32, *, bias: bool = False) -> QuantisedLinear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(inside, outside, bias=bias).to(dtype).requires_grad_(False)
    weight, scales = quantise(linear.weight)
    linear.__class__ = QuantisedLinear
    linear.weight, linear.scales = weight, scales
    return linear


def exact(layer: QuantisedLinear, x: Tensor) -> Tensor:
    """The product with s q, in float64."""
    y = x.double() @ (layer.weight.double() * layer.scales.double()[:, None]).T
    return y if layer.bias is None else y + layer.bias.double()


def error(result: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((result.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(33, 100), (1, 7), (64, 1)], ids=str)
def test_the_error_is_at_most_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(*shape, generator=RNG).to(dtype) * torch.logspace(-3, 3, shape[0]).to(dtype)[:, None]
    q, scales = quantise(weight)
    assert q.dtype == torch.int8
    assert scales.dtype == dtype
    assert int(q.abs().max()) == 127
    off = (weight.double() - q.double() * scales.double()[:, None]).abs()
    assert bool((off <= scales.double()[:, None] * 0.5001).all())


def test_an_output_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 8)
    weight[2] = 0
    q, scales = quantise(weight)
    assert not q[2].any()
    assert scales[2] == 0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(50, 64), torch.randn(20, 64)
    whole = quantise(weight)
    wanted = quantised._many(x, *whole)
    monkeypatch.setattr(matmul, "BLOCK", 7 * 64)
    parts = quantise(weight)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    torch.testing.assert_close(quantised._many(x, *whole), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inside", [64, 65, 40])  # the op takes the first, and would crash on the others
@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 3), (FEW,), (FEW + 1,), (3, 4, 5)], ids=str)
def test_it_computes_with_its_weights(rows: tuple[int, ...], inside: int, bias: bool, dtype: torch.dtype) -> None:
    linear = layer(inside, 100, dtype, bias=bias)
    x = torch.randn(*rows, inside, generator=RNG).to(dtype)
    y = linear(x)
    assert y.shape == (*rows, 100)
    assert y.dtype == dtype
    if y.numel():
        assert error(y, exact(linear, x)) < (1e-5 if dtype == torch.float32 else TOLERANCE)


@pytest.mark.parametrize("rows", [4, 40])
def test_a_row_of_nan_stays_alone(rows: int) -> None:
    linear = layer(64, 100)
    x = torch.randn(rows, 64, generator=RNG)
    x[2] = float("nan")
    others = [row for row in range(rows) if row != 2]
    assert error(linear(x)[others], exact(linear, x)[others]) < TOLERANCE


@pytest.mark.parametrize("rows", [3, 30])
def test_gradients_go_through_it(rows: int) -> None:
    linear = layer(64, 100)
    x = torch.randn(rows, 64, generator=RNG, requires_grad=True)
    upstream = torch.randn(rows, 100, generator=RNG)
    linear(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ linear.dense())


def test_a_lookup_is_the_weights_row_scaled_as_gemma_does() -> None:
    weight = torch.randn(20, 8, generator=RNG).bfloat16()
    embedding = nn.Embedding.from_pretrained(weight)
    embedding.__class__ = QuantisedEmbedding
    embedding.weight, embedding.scales = quantise(weight)
    ids = torch.tensor([[3, 3, 19], [0, 7, 1]])
    wanted = (embedding.weight.bfloat16() * embedding.scales[:, None])[ids]
    assert torch.equal(embedding(ids), wanted)
    embedding.register_buffer("embed_scale", torch.tensor(3.0))
    assert torch.equal(embedding(ids), wanted * 3)


def test_it_is_neither_saved_nor_loaded_into(small: Callable[..., LlamaForCausalLM]) -> None:
    model, plain = small(), small()
    prepare(model, "int8")
    for refused in (model.state_dict, lambda: model.load_state_dict(plain.state_dict())):
        with pytest.raises(UnsupportedError, match="loaded in int8"):
            refused()


def test_a_copy_and_another_dtype(small: Callable[..., LlamaForCausalLM]) -> None:
    model, ids = small(torch.bfloat16), torch.arange(9)[None]
    prepare(model, "int8")
    again = copy.deepcopy(model)
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.float()
    assert again.lm_head.weight.dtype == torch.int8
    assert again.lm_head.scales.dtype == torch.float32
    assert error(again(ids).logits, model(ids).logits.double()) < 0.05


def test_without_the_op_it_computes_the_same(monkeypatch: pytest.MonkeyPatch, fresh_checks: None) -> None:
    linear = layer(64, 100, torch.bfloat16)
    x = torch.randn(3, 64, generator=RNG).bfloat16()
    with_op = linear(x)
    quantised.why_not_int8_product.cache_clear()
    monkeypatch.setattr(torch.ops, "aten", SimpleNamespace())
    assert "_weight_int8pack_mm" in quantised.why_not_int8_product()
    assert error(linear(x), with_op.double()) < TOLERANCE
