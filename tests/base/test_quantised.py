"""Layers with quantised weights: they compute with the decoded ones, and all else is as in plain layers."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from loradeck import Bank, LoraConfig
from loradeck.base import quantised
from loradeck.base.fingerprint import fingerprint
from loradeck.base.quantised import (
    FEW,
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedWeight,
    quantisation,
    set_weight,
)
from loradeck.base.quantiser import quantise
from loradeck.base.weights import prepare, shared_copy
from loradeck.errors import UnsupportedError
from loradeck.native.quantised import KINDS, pack

Small = Callable[..., LlamaForCausalLM]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float64: 1e-12}
"""How far a product is off, as a share of the largest output."""
IDS = torch.randint(3, 260, (4, 12), generator=torch.Generator().manual_seed(3))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(inside: int, outside: int, kind: str = "Q4_1") -> QuantisedWeight:
    plain = random(outside, inside, seed=0) / inside**0.5
    return QuantisedWeight(pack(quantise(plain, kind, "w"), KINDS[kind], inside))


def layer(
    inside: int, outside: int, dtype: torch.dtype = torch.float32, *, bias: bool = False, kind: str = "Q4_1"
) -> QuantisedLinear:
    linear = nn.Linear(inside, outside, bias=bias, dtype=dtype).requires_grad_(False)
    set_weight(linear, weight(inside, outside, kind), dtype)
    assert isinstance(linear, QuantisedLinear)
    return linear


def near(result: Tensor, expected: Tensor, share: float) -> bool:
    return float((result.double() - expected.double()).abs().max()) <= share * float(expected.abs().max())


# ---- what it computes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 3), (FEW,), (FEW + 1,), (3, 4, 15)], ids=str)
def test_it_computes_with_the_decoded_weights(rows: tuple[int, ...], kind: str, bias: bool, dtype: torch.dtype) -> None:
    linear = layer(96, 100, dtype, bias=bias, kind=kind)
    x = random(*rows, 96).to(dtype)
    y = linear(x)
    assert y.shape == (*rows, 100)
    assert y.dtype == dtype
    plain = linear.weight.quantised.dense().double()
    expected = F.linear(x.double(), plain, None if linear.bias is None else linear.bias.double())
    if y.numel():
        assert near(y, expected, DTYPES[dtype])


@pytest.mark.parametrize("rows", [3, FEW + 40])
def test_parts_of_the_outputs_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x, upstream = layer(64, 100), random(rows, 64), random(rows, 100, seed=2)
    whole = linear.product(x), linear.input_grad(upstream)
    monkeypatch.setattr(quantised, "BLOCK", 40 * 64)  # parts of 32, and one of 4
    assert near(linear.product(x), whole[0], 1e-6)
    assert near(linear.input_grad(upstream), whole[1], 1e-6)


@pytest.mark.parametrize("rows", [4, FEW + 40])
def test_a_row_of_nan_stays_alone(rows: int) -> None:
    linear, x = layer(64, 100), random(rows, 64)
    x[2] = torch.nan
    others = [row for row in range(rows) if row != 2]
    y = linear(x)
    assert bool(y[2].isnan().all())
    assert near(y[others], F.linear(x[others], linear.dense()), 1e-5)


@pytest.mark.parametrize("rows", [3, FEW + 1])
def test_its_gradient_is_that_of_the_definition(rows: int) -> None:
    linear, plain = layer(32, 5, torch.float64, bias=True), layer(32, 5, torch.float64, bias=True).dense()
    x = random(rows, 32).double().requires_grad_()
    given = random(rows, 5, seed=2).double()
    assert torch.autograd.gradcheck(linear, x)
    (found,) = torch.autograd.grad(linear(x), x, given)
    (expected,) = torch.autograd.grad(F.linear(x, plain), x, given)
    torch.testing.assert_close(found, expected)


def test_its_weight_is_never_trained() -> None:
    linear = layer(32, 5)
    with pytest.raises(RuntimeError, match="floating point"):
        linear.weight.requires_grad_()
    linear.weight = nn.Parameter(linear.dense())
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        linear(random(3, 32))


def test_under_autocast_it_computes_as_a_plain_layer() -> None:
    linear, x = layer(64, 100), random(FEW + 1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), F.linear(x, linear.dense()))


def test_a_lookup_is_the_weights_row_scaled_as_gemma_does(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = nn.Embedding(70, 64, dtype=torch.bfloat16).requires_grad_(False)
    set_weight(embedding, weight(64, 70), torch.bfloat16)
    assert isinstance(embedding, QuantisedEmbedding)
    ids = torch.tensor([[3, 3, 69], [0, 17, 1]])
    expected = embedding.dense()[ids]
    assert torch.equal(embedding(ids), expected)
    monkeypatch.setattr("loradeck.native.quantised.PART", 1)  # a tile at a time
    assert torch.equal(embedding(ids), expected)
    embedding.register_buffer("embed_scale", torch.tensor(3.0))
    assert torch.equal(embedding(ids), expected * 3)


# ---- what it is


@pytest.fixture
def model(small: Small) -> LlamaForCausalLM:
    model = small(tied=True)
    prepare(model, "int4")
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def decoded(model: LlamaForCausalLM, small: Small) -> LlamaForCausalLM:
    """The plain model with the values of a quantised one."""
    plain = small(tied=True)
    plain.load_state_dict(model.state_dict())
    return plain


def test_its_state_is_that_of_a_plain_model(model: LlamaForCausalLM, small: Small) -> None:
    state, names = model.state_dict(), small(tied=True).state_dict()
    assert {name: (each.shape, each.dtype) for name, each in state.items()} == {
        name: (each.shape, each.dtype) for name, each in names.items()
    }
    assert near(logits(model), logits(decoded(model, small)), 1e-5)


def test_a_plain_state_replaces_what_is_quantised(model: LlamaForCausalLM, small: Small) -> None:
    other = small(tied=True, seed=7)
    model.load_state_dict(other.state_dict())
    assert quantisation(model) is None
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("copied", [copy.deepcopy, shared_copy], ids=lambda each: each.__name__)
def test_a_copy_shares_the_weights(model: LlamaForCausalLM, copied: Callable) -> None:
    again = copied(model)
    assert {id(each) for each in again.parameters() if isinstance(each, QuantisedWeight)} == {
        id(each) for each in model.parameters() if isinstance(each, QuantisedWeight)
    }
    assert torch.equal(logits(again), logits(model))


def test_it_can_be_pickled(model: LlamaForCausalLM) -> None:
    layer, again = model.lm_head, pickle.loads(pickle.dumps(model.lm_head))
    assert isinstance(again, QuantisedLinear)
    assert torch.equal(again.weight.quantised.tiles, layer.weight.quantised.tiles)
    assert torch.equal(again.dense(), layer.dense())
    assert torch.equal(again.weight.sample, layer.weight.sample)


def test_another_dtype_decodes_the_same_weights(model: LlamaForCausalLM) -> None:
    weights, before = [*map(id, model.parameters())], logits(model)
    model.bfloat16()
    assert logits(model).dtype == torch.bfloat16
    assert near(logits(model), before, 0.1)
    model.float()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = [*map(id, model.parameters())]
    assert [each for each, one in zip(ids, model.parameters(), strict=True) if isinstance(one, QuantisedWeight)] == [
        each for each, one in zip(weights, model.parameters(), strict=True) if isinstance(one, QuantisedWeight)
    ]
    assert near(logits(model), before, 0.02)  # the norms were rounded


def test_on_another_device_it_is_plain(model: LlamaForCausalLM) -> None:
    model.to("meta")
    assert quantisation(model) is None
    assert {each.device.type for each in model.parameters()} == {"meta"}
    assert model.lm_head.weight.shape == (260, 256)


def test_merging_replaces_weights_and_unmerging_restores_them(model: LlamaForCausalLM, small: Small) -> None:
    before, weights = logits(model), {name: id(each) for name, each in model.named_parameters()}
    merged = []
    for each in (decoded(model, small), model):
        bank = Bank(each)
        adapter = bank.add("a", LoraConfig(r=4), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        bank.merge("a")
        merged.append(logits(each))
    assert near(merged[1], merged[0], 1e-5)
    assert not near(merged[1], before, 1e-2)
    bank.unmerge()
    bank.detach()
    assert {name: id(each) for name, each in model.named_parameters()} == weights
    assert torch.equal(logits(model), before)


def test_its_fingerprint_is_of_the_weights_it_stands_for(model: LlamaForCausalLM, small: Small) -> None:
    assert fingerprint(model) == fingerprint(small(tied=True))  # what it was made from
    for module in model.modules():
        if isinstance(module, QuantisedLinear | QuantisedEmbedding):
            set_weight(module, QuantisedWeight(module.weight.quantised), torch.float32)
    assert fingerprint(model) != fingerprint(small(tied=True))
    model.lm_head.weight = model.model.embed_tokens.weight
    assert fingerprint(model) == fingerprint(decoded(model, small))


def test_it_says_how_it_is_quantised(model: LlamaForCausalLM, small: Small) -> None:
    assert quantisation(small()) is None
    assert quantisation(model) == "Q4_1"
    set_weight(model.model.layers[0].mlp.up_proj, weight(256, 320, "Q8_0"), torch.float32)
    assert quantisation(model) == "Q4_1, Q8_0"
