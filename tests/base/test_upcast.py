"""On a CPU that emulates half precision, products are computed in float32 with the same weights, rounded once."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from loradeck.base import frozen, matmul, prepacked
from loradeck.base.frozen import UpcastLinear, upcast
from loradeck.base.matmul import FEW, input_grad, linear
from loradeck.base.prepacked import PackedLinear
from loradeck.base.weights import prepare

HALVES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative, of one number


@pytest.fixture(autouse=True, params=[False, True], ids=["emulated", "computed"])
def able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU has arithmetic for half precision, whatever this one can do."""
    for module in (matmul, frozen):
        monkeypatch.setattr(module, "computes_in", lambda dtype, _: request.param or dtype.itemsize > 2)
    return request.param


def exact(one: torch.Tensor, other: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether a product of two tensors is float64's, rounded to the result's dtype and no more than once."""
    wanted = one.double() @ other.double()
    slack = 1e-6 * wanted.abs().max()
    return bool(((result.double() - wanted).abs() <= ROUNDING[result.dtype] * wanted.abs() + slack).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(FEW + 1, 64), (2, 5, 64), (300, 64)], ids=str)
@pytest.mark.parametrize("block", [1, 7 * 64, 1 << 20])
def test_products_are_exact_but_for_one_rounding(
    able: bool, dtype: torch.dtype, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "BLOCK", block)
    x, weight = torch.randn(*shape).to(dtype), torch.randn(50, 64).to(dtype)
    grad = torch.randn(*shape[:-1], 50).to(dtype)
    y, dx = linear(x, weight), input_grad(grad, weight)
    assert (y.shape, dx.shape, y.dtype, dx.dtype) == (grad.shape, x.shape, dtype, dtype)
    if able:
        assert torch.equal(y, F.linear(x, weight))
        assert torch.equal(dx, grad @ weight)
    else:
        assert exact(x, weight.t(), y)
        assert exact(grad, weight, dx)


@pytest.mark.parametrize("rows", [0, 1, FEW, FEW + 1])
def test_a_bias_and_few_rows(rows: int) -> None:
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((rows, 64), (50, 64), (50,)))
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=2**-6, atol=2**-5)
    assert input_grad(torch.randn(rows, 50).bfloat16(), weight).shape == x.shape


def test_float32_and_autocast_are_torchs_own() -> None:
    x, weight = torch.randn(20, 64), torch.randn(50, 64)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16


def test_only_emulated_dtypes_are_upcast(able: bool) -> None:
    for dtype in (*HALVES, torch.float32, torch.float64):
        layer = nn.Linear(8, 8, dtype=dtype).requires_grad_(False)
        weight = layer.weight
        upcast(layer)
        assert type(layer) is (UpcastLinear if dtype in HALVES and not able else nn.Linear)
        assert layer.weight is weight


def test_gradients_go_through_it() -> None:
    plain = nn.Linear(64, 50).requires_grad_(False).bfloat16()
    layer = copy.deepcopy(plain)
    layer.__class__ = UpcastLinear
    x, upstream = torch.randn(3, 5, 64).bfloat16(), torch.randn(3, 5, 50).bfloat16()
    gradients = []
    for each in (plain, layer):
        leaf = x.clone().requires_grad_()
        each(leaf).backward(upstream)
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2**-6, atol=2**-5)


def test_layers_that_are_not_packed_are_upcast(
    able: bool, small: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepacked, "why_not_packed", lambda dtype: "not available")
    plain, model = small(torch.bfloat16, tied=True), small(torch.bfloat16, tied=True)
    prepare(model, "packed")
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear if able else UpcastLinear}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert PackedLinear not in kinds
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=5e-2, atol=5e-2)
    model.float()
    assert torch.equal(model(ids).logits, plain.float()(ids).logits)
