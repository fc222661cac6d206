"""A layer whose weight lies in another layout, packed or in blocks, is the plain one in everything but speed."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from loradeck.base import blocked, prepacked
from loradeck.base.blocked import BlockLinear, BlockWeight, block, why_not_blocked
from loradeck.base.frozen import LayoutLinear
from loradeck.base.prepacked import MIN_WEIGHTS, PackedLinear, pack, why_not_packed
from loradeck.base.weights import Weights, prepare
from loradeck.errors import UnsupportedError


@dataclass(frozen=True)
class Layout:
    name: Weights
    lay_out: Callable[[nn.Linear], None]
    kind: type[LayoutLinear]
    tolerance: dict[torch.dtype, float]
    why_not: Callable[[torch.dtype], str | None]
    is_laid_out: Callable[[torch.Tensor], bool]

    def __str__(self) -> str:
        return self.name


PACKED = Layout("packed", pack, PackedLinear, prepacked.TOLERANCE, why_not_packed, lambda weight: weight.is_mkldnn)
BLOCKS = Layout(
    "blocks", block, BlockLinear, blocked.TOLERANCE, why_not_blocked, lambda weight: isinstance(weight, BlockWeight)
)


def here(layout: Layout, dtype: torch.dtype) -> pytest.MarkDecorator:
    """Run only if this machine has the layout: blocks need a compiler, packed bfloat16 needs AVX-512 or conversions."""
    why = layout.why_not(dtype)
    return pytest.mark.skipif(why is not None, reason=f"{layout} {dtype}: {why}")


def layouts(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    """Run with each layout in these of its dtypes; in all of them if none is given."""
    params = [
        pytest.param(layout, dtype, marks=here(layout, dtype), id=f"{layout} {dtype}")
        for layout in (PACKED, BLOCKS)
        for dtype in dtypes or layout.tolerance
    ]
    return pytest.mark.parametrize(("layout", "dtype"), params)


def linear(inside: int, outside: int, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(inside, outside, bias=bias).to(dtype).requires_grad_(False)


def pair(
    layout: Layout, *shape: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[nn.Linear, LayoutLinear]:
    """The same layer twice: plain, and in the layout."""
    plain, layer = linear(*shape, dtype, bias=bias), linear(*shape, dtype, bias=bias)
    layout.lay_out(layer)
    assert isinstance(layer, layout.kind)
    assert layout.is_laid_out(layer.weight)
    return plain, layer


def near(layout: Layout, result: torch.Tensor, expected: torch.Tensor) -> bool:
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    bound = layout.tolerance[expected.dtype] * float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(result, expected, rtol=0, atol=bound)


@layouts()
@pytest.mark.parametrize("shape", [(256, 256), (257, 300), (1030, 67)], ids=str)
def test_the_weight_comes_back_bit_for_bit(layout: Layout, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    plain, layer = pair(layout, *shape, dtype=dtype)
    assert torch.equal(layer.dense(), plain.weight)
    steps = (64, 32) if layout is BLOCKS else (1, 1)
    outputs, inputs = (-(-size // step) * step for size, step in zip(plain.weight.shape, steps, strict=True))
    assert layer.weight.nbytes == outputs * inputs * dtype.itemsize


@layouts()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(257,), (1, 257), (3, 257), (2, 20, 257), (2, 3, 4, 257), (0, 257), (65, 257), (2, 300, 257)], ids=str
)
def test_it_computes_what_the_plain_layer_does(
    layout: Layout, dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    plain, layer = pair(layout, 257, 300, dtype=dtype, bias=bias)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert near(layout, layer(x), plain(x))
    if len(shape) == 2:
        strided = x.t().contiguous().t()
        assert near(layout, layer(strided), plain(strided))


@layouts(torch.float32)
def test_a_row_of_nan_stays_alone(layout: Layout, dtype: torch.dtype) -> None:
    plain, layer = pair(layout, 256, 256)
    x = torch.randn(5, 256)
    x[2] = float("nan")
    others = [0, 1, 3, 4]
    assert near(layout, layer(x)[others], plain(x)[others])


@layouts()
def test_gradients_go_through_it(layout: Layout, dtype: torch.dtype) -> None:
    plain, layer = pair(layout, 256, 300, dtype=dtype)
    x = torch.randn(3, 5, 256).to(dtype)
    upstream = torch.randn(3, 5, 300).to(dtype)
    gradients = []
    for each in (plain, layer):
        leaf = x.clone().requires_grad_()
        each(leaf).backward(upstream)
        gradients.append(leaf.grad)
    assert near(layout, gradients[1], gradients[0])


@layouts(torch.float32)
def test_gradients_of_gradients_go_through_it(layout: Layout, dtype: torch.dtype) -> None:
    plain, layer = pair(layout, 256, 300)
    gradients = []
    for each in (plain, layer):
        leaf = torch.randn(3, 256, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (gradient,) = torch.autograd.grad(each(leaf).square().sum(), leaf, create_graph=True)
        gradients.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    assert near(layout, gradients[1], gradients[0])


@layouts(torch.float32)
def test_its_weight_is_not_trained(layout: Layout, dtype: torch.dtype) -> None:
    _, layer = pair(layout, 256, 256)
    layer.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        layer(torch.randn(1, 256))


@layouts(torch.float32)
@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast_it_is_the_plain_layer(layout: Layout, dtype: torch.dtype, grad: bool) -> None:
    plain, layer = pair(layout, 256, 256)
    x = torch.randn(3, 256, requires_grad=grad)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = layer(x), plain(x)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)


@layouts(torch.float32)
def test_another_dtype_is_refused_as_by_the_plain_layer(layout: Layout, dtype: torch.dtype) -> None:
    plain, layer = pair(layout, 256, 256)
    for each in (plain, layer):
        with pytest.raises(RuntimeError, match="dtype"):
            each(torch.randn(3, 256, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("layout", "layer"),
    [
        (PACKED, linear(255, 257)),
        (PACKED, linear(256, 256, torch.float16)),
        (PACKED, linear(256, 256, torch.float64)),
        (BLOCKS, linear(256, 256, torch.float64)),
    ],
    ids=str,
)
def test_small_layers_and_other_dtypes_stay_plain(layout: Layout, layer: nn.Linear) -> None:
    weight = layer.weight
    layout.lay_out(layer)
    assert type(layer) is nn.Linear
    assert layer.weight is weight
    assert 255 * 257 < MIN_WEIGHTS == 256 * 256


@layouts(torch.bfloat16)
def test_moving_it_to_another_dtype_and_back(layout: Layout, dtype: torch.dtype) -> None:
    plain, layer = pair(layout, 256, 300, dtype=dtype)
    layer.float()
    assert layout.is_laid_out(layer.weight)
    assert torch.equal(layer.dense(), plain.weight.float())
    layer.double()
    assert not layout.is_laid_out(layer.weight)
    x = torch.randn(3, 256, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, plain.weight.double(), plain.bias.double()))
    layer.bfloat16()
    assert layout.is_laid_out(layer.weight)
    assert torch.equal(layer.dense(), plain.weight)


@layouts(torch.float32)
def test_a_copy_shares_its_weight_and_a_pickle_keeps_it(layout: Layout, dtype: torch.dtype) -> None:
    plain, layer = pair(layout, 256, 300)
    assert copy.deepcopy(layer).weight is layer.weight
    again = pickle.loads(pickle.dumps(layer))
    assert layout.is_laid_out(again.weight)
    assert torch.equal(again.dense(), plain.weight)


@layouts(torch.float32)
def test_state_dict_is_the_plain_ones(
    small: Callable[..., LlamaForCausalLM], layout: Layout, dtype: torch.dtype
) -> None:
    plain, model, other = small(), small(), small(seed=1)
    prepare(model, layout.name)
    prepare(other, layout.name)
    expected, state = plain.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    other.load_state_dict(expected)
    assert layout.is_laid_out(other.lm_head.weight)
    assert torch.equal(other.lm_head.dense(), plain.lm_head.weight)


@pytest.mark.parametrize("gone", ["_reorder_linear_weight", "_linear_pointwise"])
def test_without_its_op_nothing_is_packed(
    small: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, fresh_checks: None, gone: str
) -> None:
    ops = {"_reorder_linear_weight", "_linear_pointwise"} - {gone}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**{op: getattr(torch.ops.mkldnn, op) for op in ops}))
    model, plain = small(), small()
    prepare(model, "packed")
    assert gone in prepacked.why_not_packed(torch.float32)
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_without_a_compiler_nothing_lies_in_blocks(
    small: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch, fresh_checks: None
) -> None:
    def missing(*_: object, **__: object) -> torch.Tensor:
        raise OSError("no C compiler")

    monkeypatch.setattr(blocked, "product", missing)
    model, plain = small(), small()
    prepare(model, "blocks")
    assert blocked.why_not_blocked(torch.float32) == "is unavailable (no C compiler)"
    assert not any(isinstance(module, BlockLinear) for module in model.modules())
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
