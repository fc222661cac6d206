"""Dropout with a seed is a function: of neither the neighbours, nor what ran before, nor how often a layer runs."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loradeck import Adapter, Bank, LoraConfig
from loradeck.errors import RouteError

JOBS = {
    "a": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    "b": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.5),
    "c": LoraConfig(r=5, lora_alpha=5, target_modules=["embed_tokens", "down_proj", "k_proj"], lora_dropout=0.3),
}
SEEDS = {"a": 11, "b": 12, "c": 13}
ROWS = {"spans": {"a": [0, 1], "b": [2], "c": [3, 4, 5]}, "in turns": {"a": [0, 3], "b": [1], "c": [2, 4, 5]}}
IDS = torch.randint(3, 260, (6, 9), generator=torch.Generator().manual_seed(3))


def losses(bank: Bank, ids: Tensor, jobs: list[str], seeds: dict[str, int | None] = SEEDS) -> Tensor:
    """One forward: mean of something that depends on every logit, per row."""
    for name in bank.names():
        bank[name].dropout.seed = seeds[name]
    with bank.route(jobs):
        return bank.model(ids).logits.log_softmax(-1).square().mean((1, 2))


def gradients(bank: Bank, ids: Tensor, jobs: list[str], seeds: dict[str, int | None] = SEEDS) -> dict[str, Tensor]:
    """One forward and backward, inside the route as gradient checkpointing needs it."""
    bank.model.zero_grad()
    with bank.route(jobs):
        losses(bank, ids, jobs, seeds).sum().backward()
    return {f"{name} {key}": t.grad.clone() for name in sorted({*jobs}) for key, t in bank[name].tensors()}


def checkpoint(model: PreTrainedModel, reentrant: bool) -> None:
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # as older ones call it
    enable = getattr(model, f"{word}_checkpointing_enable")
    enable(**{f"{word}_checkpointing_kwargs": {"use_reentrant": reentrant}})


@pytest.fixture
def open_bank(tiny, fill):
    """Return a function that opens a bank with some of the jobs, all with the same values each time."""

    def open_bank(names: str) -> Bank:
        bank = Bank(tiny.train())
        for name in names:
            fill(bank.add(name, JOBS[name]), seed=ord(name), size=0.1)
        return bank

    return open_bank


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_together_is_alone(open_bank, rows):
    """Law 3: with different ranks, shares, targets and rows; losses and gradients."""
    bank = open_bank("abc")
    jobs = [name for row in range(6) for name in rows if row in rows[name]]
    together, grads = losses(bank, IDS, jobs).detach(), gradients(bank, IDS, jobs)
    bank.detach()
    for name, own in rows.items():
        alone = open_bank(name)
        assert torch.allclose(together[own], losses(alone, IDS[own], [name] * len(own)), atol=1e-5, rtol=1e-5)
        for key, wanted in gradients(alone, IDS[own], [name] * len(own)).items():
            assert torch.allclose(grads[key], wanted, atol=1e-5, rtol=1e-4), key
        assert not torch.allclose(together[own], losses(alone, IDS[own], [name] * len(own), {name: 99}), atol=1e-4)
        alone.detach()


def test_a_resumed_run_draws_the_same(open_bank):
    """In a bank of its own, with no state of any generator saved."""
    first = open_bank("b")
    torch.rand(5)
    for seed in (1, 2):
        losses(first, IDS, ["b"] * 6, {"b": seed})
    wanted = losses(first, IDS, ["b"] * 6, {"b": 3})
    first.detach()
    assert torch.equal(losses(open_bank("b"), IDS, ["b"] * 6, {"b": 3}), wanted)


def test_without_gradients_the_mask_is_the_same(open_bank):
    bank = open_bank("b")
    wanted = losses(bank, IDS, ["b"] * 6)
    with torch.no_grad():
        assert torch.allclose(losses(bank, IDS, ["b"] * 6), wanted, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_gradient_checkpointing_draws_the_same_mask(open_bank, reentrant, rows):
    bank = open_bank("abc")
    jobs = [name for row in range(6) for name in rows if row in rows[name]]
    wanted = gradients(bank, IDS, jobs)
    checkpoint(bank.model, reentrant)
    for key, got in gradients(bank, IDS, jobs).items():
        assert torch.allclose(got, wanted[key], atol=1e-6, rtol=1e-5), key


def test_gradient_checkpointing_without_a_seed_is_refused(open_bank):
    bank = open_bank("ab")
    checkpoint(bank.model, False)
    with pytest.raises(RouteError, match=r"(?s)another mask.*seed"):
        gradients(bank, IDS, ["a", "b"] * 3, {"a": 1, "b": None})


def test_layers_have_masks_of_their_own(tiny, fill):
    """The same values on the same input at two layers: only their paths differ."""
    bank = Bank(tiny.train())
    adapter = fill(bank.add("a", LoraConfig(r=4, target_modules=["gate_proj", "up_proj"], lora_dropout=0.5)))
    adapter.dropout.seed = 1
    mlp, x = tiny.model.layers[0].mlp, torch.randn(3, 64)
    with torch.no_grad():
        mlp.up_proj.weight.copy_(mlp.gate_proj.weight)
        for own, other in zip(
            adapter.pair("model.layers.0.mlp.up_proj"), adapter.pair("model.layers.0.mlp.gate_proj"), strict=True
        ):
            own.copy_(other)
    with bank.route("a"):
        assert not torch.allclose(mlp.up_proj(x), mlp.gate_proj(x))
        assert torch.equal(mlp.up_proj(x), mlp.up_proj(x))
        tiny.eval()
        assert torch.equal(mlp.up_proj(x), mlp.gate_proj(x))


def test_who_drops(tiny, tmp_path):
    """A trainable adapter with a share; each with a generator of its own, drawn from the one it was made with."""
    bank = Bank(tiny.train())
    bank.add("none", LoraConfig(r=2))
    assert bank["none"].dropout is None
    bank.add("own", JOBS["b"], generator=torch.Generator().manual_seed(1))
    bank.add("twin", JOBS["b"], generator=torch.Generator().manual_seed(1))
    own, twin = bank["own"].dropout, bank["twin"].dropout
    assert own.p == 0.5
    assert own is not twin
    assert own.generator.initial_seed() == twin.generator.initial_seed()
    bank.save("own", tmp_path / "own")
    bank.load(tmp_path / "own", "again", trainable=True)
    assert bank["again"].dropout.generator.initial_seed() != own.generator.initial_seed()


def test_a_frozen_adapter_drops_nothing(tiny, fill, tmp_path):
    bank = Bank(tiny.train())
    fill(bank.add("a", JOBS["b"]))
    bank.save("a", tmp_path / "a")
    bank.load(tmp_path / "a", "frozen")
    assert isinstance(bank["frozen"], Adapter)
    with torch.no_grad():
        with bank.route("frozen"):
            trained = tiny(IDS).logits
            tiny.eval()
            assert torch.equal(tiny(IDS).logits, trained)
        with bank.route("a"):
            tiny.train()
            assert not torch.allclose(tiny(IDS).logits, trained, atol=1e-3)
