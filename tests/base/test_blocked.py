"""A layer in blocks is the plain one in everything but speed."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GptOssConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loradeck.base import blocked
from loradeck.base.blocked import (
    TOLERANCE,
    BlockExperts,
    BlockLinear,
    BlockWeight,
    block,
    block_experts,
    why_not_blocked,
)
from loradeck.base.weights import prepare
from loradeck.errors import UnsupportedError


def here(dtype: torch.dtype) -> pytest.MarkDecorator:
    """Run only if this machine multiplies weights of a dtype in blocks: it needs a compiler."""
    why = why_not_blocked(dtype)
    return pytest.mark.skipif(why is not None, reason=f"blocks of {dtype}: {why}")


DTYPES = [pytest.param(dtype, marks=here(dtype)) for dtype in TOLERANCE]


def linear(inside: int, outside: int, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(inside, outside, bias=bias).to(dtype).requires_grad_(False)


def pair(*shape: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """The same layer twice: plain, and in blocks."""
    plain, layer = linear(*shape, dtype, bias=bias), linear(*shape, dtype, bias=bias)
    block(layer)
    assert isinstance(layer, BlockLinear)
    assert isinstance(layer.weight, BlockWeight)
    return plain, layer


def near(result: torch.Tensor, expected: torch.Tensor) -> bool:
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    bound = TOLERANCE[expected.dtype] * float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(result, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(256, 256), (257, 300), (1030, 67)], ids=str)
def test_the_weight_comes_back_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    plain, layer = pair(*shape, dtype=dtype)
    assert torch.equal(layer.dense(), plain.weight)
    outputs, inputs = (-(-size // step) * step for size, step in zip(plain.weight.shape, (64, 32), strict=True))
    assert layer.weight.nbytes == outputs * inputs * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(257,), (1, 257), (3, 257), (2, 20, 257), (2, 3, 4, 257), (0, 257), (65, 257)], ids=str
)
def test_it_computes_what_the_plain_layer_does(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    plain, layer = pair(257, 300, dtype=dtype, bias=bias)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert near(layer(x), plain(x))
    if len(shape) == 2:
        strided = x.t().contiguous().t()
        assert near(layer(strided), plain(strided))


def test_a_row_of_nan_stays_alone() -> None:
    plain, layer = pair(256, 256)
    x = torch.randn(5, 256)
    x[2] = float("nan")
    others = [0, 1, 3, 4]
    assert near(layer(x)[others], plain(x)[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_go_through_it(dtype: torch.dtype) -> None:
    plain, layer = pair(256, 300, dtype=dtype)
    x = torch.randn(3, 5, 256).to(dtype)
    upstream = torch.randn(3, 5, 300).to(dtype)
    gradients = []
    for each in (plain, layer):
        leaf = x.clone().requires_grad_()
        each(leaf).backward(upstream)
        gradients.append(leaf.grad)
    assert near(gradients[1], gradients[0])


def test_gradients_of_gradients_go_through_it() -> None:
    plain, layer = pair(256, 300)
    gradients = []
    for each in (plain, layer):
        leaf = torch.randn(3, 256, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (gradient,) = torch.autograd.grad(each(leaf).square().sum(), leaf, create_graph=True)
        gradients.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    assert near(gradients[1], gradients[0])


def test_its_weight_is_not_trained() -> None:
    _, layer = pair(256, 256)
    layer.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        layer(torch.randn(1, 256))


@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast_it_is_the_plain_layer(grad: bool) -> None:
    plain, layer = pair(256, 256)
    x = torch.randn(3, 256, requires_grad=grad)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = layer(x), plain(x)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)


def test_another_dtype_is_refused_as_by_the_plain_layer() -> None:
    plain, layer = pair(256, 256)
    for each in (plain, layer):
        with pytest.raises(RuntimeError, match="dtype"):
            each(torch.randn(3, 256, dtype=torch.bfloat16))


def test_other_dtypes_stay_plain() -> None:
    layer = linear(256, 256, torch.float64)
    weight = layer.weight
    block(layer)
    assert type(layer) is nn.Linear
    assert layer.weight is weight


@here(torch.bfloat16)
def test_moving_it_to_another_dtype_and_back() -> None:
    plain, layer = pair(256, 300, dtype=torch.bfloat16)
    layer.float()
    assert isinstance(layer.weight, BlockWeight)
    assert torch.equal(layer.dense(), plain.weight.float())
    layer.double()
    assert not isinstance(layer.weight, BlockWeight)
    x = torch.randn(3, 256, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, plain.weight.double(), plain.bias.double()))
    layer.bfloat16()
    assert isinstance(layer.weight, BlockWeight)
    assert torch.equal(layer.dense(), plain.weight)


def test_a_copy_shares_its_weight_and_a_pickle_keeps_it() -> None:
    plain, layer = pair(256, 300)
    assert copy.deepcopy(layer).weight is layer.weight
    again = pickle.loads(pickle.dumps(layer))
    assert isinstance(again.weight, BlockWeight)
    assert torch.equal(again.dense(), plain.weight)


def test_state_dict_is_the_plain_ones(small: Callable[..., LlamaForCausalLM]) -> None:
    plain, model, other = small(), small(), small(seed=1)
    prepare(model, "blocks")
    prepare(other, "blocks")
    expected, state = plain.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    other.load_state_dict(expected)
    assert isinstance(other.lm_head.weight, BlockWeight)
    assert torch.equal(other.lm_head.dense(), plain.lm_head.weight)


def experts(dtype: torch.dtype = torch.float32) -> MixtralExperts:
    """Five experts whose widths are no multiples of a block."""
    shape = {"num_local_experts": 5, "hidden_size": 72, "intermediate_size": 56}
    module = MixtralExperts(MixtralConfig(**shape, experts_implementation="eager")).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 16)
    return module.to(dtype)


def expert_pair(dtype: torch.dtype = torch.float32) -> tuple[MixtralExperts, BlockExperts]:
    """The same experts twice: plain, and in blocks."""
    plain, module = experts(dtype), experts(dtype)
    block_experts(module)
    assert isinstance(module, BlockExperts)
    assert all(isinstance(weight, BlockWeight) for weight in module.parameters())
    return plain, module


def routing(tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, and the numbers and shares of their experts; some experts compute no token."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.tensor([[0, 3], [3, 4], [4, 0]])[torch.arange(tokens) % 3]
    return torch.randn(tokens, 72, generator=generator), numbers, torch.rand(tokens, 2, generator=generator)


def same_weights(module: nn.Module, plain: nn.Module) -> bool:
    state, expected = module.state_dict(), plain.state_dict()
    return [*state] == [*expected] and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_compute_what_the_plain_ones_do(implementation: str, dtype: torch.dtype) -> None:
    plain, module = expert_pair(dtype)
    x, numbers, shares = routing()
    results = []
    for each in (plain, module):
        each.config._experts_implementation = implementation
        leaf = x.to(dtype).requires_grad_()
        y = each(leaf, numbers, shares.to(dtype))
        y.float().square().sum().backward()
        results.append((y, leaf.grad))
    assert torch.equal(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])
    assert same_weights(module, plain)


@here(torch.bfloat16)
def test_experts_move_are_copied_and_are_pickled() -> None:
    plain, module = expert_pair(torch.bfloat16)
    assert copy.deepcopy(module).down_proj is module.down_proj
    assert same_weights(pickle.loads(pickle.dumps(module)), plain)
    x, numbers, shares = routing()
    module.double()
    assert not isinstance(module.down_proj, BlockWeight)
    assert torch.equal(
        module(x.double(), numbers, shares.double()), plain.double()(x.double(), numbers, shares.double())
    )
    module.bfloat16()
    assert isinstance(module.down_proj, BlockWeight)
    assert same_weights(module, plain.bfloat16())
    other = expert_pair(torch.bfloat16)[1]
    other.load_state_dict({name: 2 * weight for name, weight in plain.state_dict().items()})
    assert isinstance(other.down_proj, BlockWeight)
    assert torch.equal(other.dense("down_proj"), 2 * plain.down_proj)


def test_other_modules_are_no_experts() -> None:
    """Those with biases, and those whose weights lie the other way round."""
    config = GptOssConfig(hidden_size=64, intermediate_size=32, num_local_experts=2)
    turned = experts()
    turned.gate_up_proj, turned.down_proj = (
        nn.Parameter(weight.transpose(1, 2).contiguous(), requires_grad=False)
        for weight in (turned.gate_up_proj, turned.down_proj)
    )
    for module in (GptOssExperts(config).requires_grad_(False), turned, nn.Linear(2, 2)):
        kind = type(module)
        block_experts(module)
        assert type(module) is kind


def test_a_mixture_in_blocks_is_saved_as_it_was(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    model = MixtralForCausalLM(MixtralConfig(**shape, **heads)).requires_grad_(False)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    prepare(model, "blocks")
    assert isinstance(model.model.layers[0].mlp.experts, BlockExperts)
    model.save_pretrained(tmp_path)
    again = MixtralForCausalLM.from_pretrained(tmp_path).state_dict()
    assert [*again] == [*expected]
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_without_a_compiler_nothing_lies_in_blocks(
    small: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> torch.Tensor:
        raise OSError("no C compiler")

    blocked.why_not_blocked.cache_clear()
    monkeypatch.setattr(blocked, "product", missing)
    model, plain = small(), small()
    prepare(model, "blocks")
    assert blocked.why_not_blocked(torch.float32) == "is unavailable (no C compiler)"
    blocked.why_not_blocked.cache_clear()
    assert not any(isinstance(module, BlockLinear) for module in model.modules())
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
