"""Experts in blocks are the plain ones in everything but speed."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loradeck.base.blocked import TOLERANCE, BlockExperts, BlockWeight, block_experts, why_not_blocked
from loradeck.base.weights import prepare


def here(dtype: torch.dtype) -> pytest.MarkDecorator:
    """Run only if this machine multiplies weights of a dtype in blocks: it needs a compiler."""
    why = why_not_blocked(dtype)
    return pytest.mark.skipif(why is not None, reason=f"blocks of {dtype}: {why}")


DTYPES = [pytest.param(dtype, marks=here(dtype)) for dtype in TOLERANCE]


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


def test_experts_beside_a_shared_one_stay_plain() -> None:
    sizes = {"num_experts": 4, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 32}
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**sizes, num_hidden_layers=1, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    ).requires_grad_(False)
    experts = model.model.layers[0].mlp.experts
    plain = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    prepare(model, "blocks")
    assert not isinstance(experts, BlockExperts)
    assert all(torch.equal(parameter, plain[name]) for name, parameter in experts.named_parameters())
