"""The definition against torch's and transformers' own operations, and its updates against a bank's."""

import pytest
import torch
import torch.nn.functional as F
from tests.decoders import MODELS, SIZES, build, text
from torch import nn
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from loradeck.base.quantiser import quantise
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.native import reference
from loradeck.native.quantised import KINDS, pack
from loradeck.native.table import Linear
from loradeck.runner.description import describe

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("turned", [8, 6])
def test_heads_are_turned_as_transformers_turns_them(turned: int) -> None:
    x = random(5, 3, 8)
    angles = random(5, turned // 2, seed=1)
    cos, sin = (torch.cat((part, part), dim=1)[None] for part in (angles.cos(), angles.sin()))
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    assert torch.allclose(reference.rotate(x, angles.cos(), angles.sin()), expected[0].transpose(0, 1))


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_a_token_attends_to_those_before_it_within_the_window(window: int | None) -> None:
    query, key, value = random(7, 4, 8), random(7, 2, 8, seed=1), random(7, 2, 8, seed=2)
    mask = torch.tensor([[0 <= t - s < (window or 7) for s in range(7)] for t in range(7)])
    expected = F.scaled_dot_product_attention(
        *(part.transpose(0, 1)[None] for part in (query, key, value)), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    result = reference.attend(query, key, value, 0.3, None, window)
    assert torch.allclose(result, expected[0].transpose(0, 1), atol=1e-6)


def test_scores_are_capped_before_the_softmax() -> None:
    query, key, value = random(2, 1, 4), random(2, 1, 4, seed=1), random(2, 1, 4, seed=2)
    scores = 0.5 * torch.tanh(query[1, 0] @ key[:, 0].T * 3.0 / 0.5)
    expected = scores.softmax(0) @ value[:, 0]
    assert torch.allclose(reference.attend(query, key, value, 3.0, 0.5, None)[1, 0], expected, atol=1e-6)


def test_a_norm_is_of_each_head_or_of_all_together() -> None:
    x = random(5, 12)
    each, together = random(4, seed=1), random(12, seed=2)
    assert torch.allclose(
        reference.head_norm(x, each, 1e-6), F.rms_norm(x.view(5, 3, 4), (4,), each, 1e-6).flatten(1), atol=1e-6
    )
    assert torch.allclose(reference.head_norm(x, together, 1e-6), F.rms_norm(x, (12,), together, 1e-6), atol=1e-6)
    assert reference.head_norm(x, None, 1e-6) is x


def test_rows_of_a_quantised_module_have_their_own_biases() -> None:
    weight = pack(quantise(random(10, 64), "Q4_1", "qkv"), KINDS["Q4_1"], 64)
    bias, x = random(10, seed=1), random(3, 64, seed=2)
    whole = F.linear(x, weight.dense(), bias)
    part = reference.project(Linear("qkv", weight, 4, 3, bias), x)
    assert torch.allclose(part, whole[:, 4:7], atol=1e-6)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "phi3-partial", "gemma2", "qwen3-moe"])
def test_updates_are_those_of_a_bank(name: str) -> None:
    kind, settings = MODELS[name]
    model = build(kind, {**SIZES, **settings})
    bank = Bank(model)
    targets = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapter = bank.add("poet", LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), bank.route(["poet"]):
        expected = model(input_ids=text()[None]).logits[0]
    updates = {path: (*adapter.pair(path), site.scaling) for path, site in adapter.sites.items()}
    table = describe(model)
    result = reference.logits(table, text(), updates)
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (result - reference.logits(table, text())).abs().max() > 0.1 * expected.abs().max()
