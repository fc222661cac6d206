"""A fingerprint is the base's, whatever its dtype; anything that makes another base changes it."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from loradeck.base.fingerprint import SAMPLED, fingerprint
from loradeck.base.load import SMOLLM2, Base


def test_fp32_and_bf16_are_one_base(tiny: LlamaForCausalLM) -> None:
    assert fingerprint(deepcopy(tiny).bfloat16()) == fingerprint(tiny)


def test_upcast_bf16_is_one_base_too(tiny: LlamaForCausalLM) -> None:
    assert fingerprint(deepcopy(tiny).bfloat16().float()) == fingerprint(tiny)


def test_is_sha256(tiny: LlamaForCausalLM) -> None:
    assert len(bytes.fromhex(fingerprint(tiny))) == 32


def _weights(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.05)


def _the_end_of_a_large_tensor(model: LlamaForCausalLM) -> None:
    model.lm_head.weight.data[200:] += 1


def _last_small_tensor(model: LlamaForCausalLM) -> None:
    model.model.norm.weight.data[-1] += 1


def _name(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[0]
    layer.other_norm = layer.input_layernorm
    del layer.input_layernorm


def _shape(model: LlamaForCausalLM) -> None:
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.data.reshape(64, 96), requires_grad=False)


def _class(model: LlamaForCausalLM) -> None:
    model.__class__ = type("AnotherForCausalLM", (type(model),), {})


@pytest.mark.parametrize("change", [_weights, _the_end_of_a_large_tensor, _last_small_tensor, _name, _shape, _class])
def test_notices(tiny: LlamaForCausalLM, change: Callable[[LlamaForCausalLM], None]) -> None:
    before = fingerprint(tiny)
    change(tiny)
    assert fingerprint(tiny) != before


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.head = nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

    tied = Tied()
    untied = deepcopy(tied)
    untied.head.weight = nn.Parameter(tied.embed.weight.detach().clone())
    assert fingerprint(tied) == fingerprint(deepcopy(tied)) != fingerprint(untied)


@pytest.mark.parametrize("count", [0, 1, SAMPLED - 1, SAMPLED, 2 * SAMPLED + 1])
def test_any_size(count: int) -> None:
    layer = nn.ParameterList([nn.Parameter(torch.zeros(count))])
    other = nn.ParameterList([nn.Parameter(torch.zeros(count + 1))])
    assert fingerprint(layer) != fingerprint(other)


@pytest.mark.real
def test_real_base_is_the_same_in_bf16(smollm2: Base) -> None:
    assert fingerprint(smollm2.model) == smollm2.fingerprint
    assert Base.load(SMOLLM2, dtype="bfloat16", device="cpu").fingerprint == smollm2.fingerprint
