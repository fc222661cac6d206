"""A step's logits are those of a plain forward, however its rows lie and whatever else is computed."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from loradeck import Adapter, Bank, Base
from loradeck.base.weights import shared_copy
from loradeck.errors import BaseModelError, LoradeckError
from loradeck.sampling import SamplingParams
from loradeck.serve.kv_cache import KVCache
from loradeck.serve.model_runner import ModelRunner
from loradeck.serve.request import Key, Request, Scheduled

from .conftest import MODELS, TARGETS, VOCABULARY, adapter

ALL = SamplingParams(prompt_logprobs=0)  # logits of every position


def request(tokens: list[int], key=(), sampling: SamplingParams = ALL) -> Request:
    return Request(tokens, sampling, key)


def step(runner: ModelRunner, cache: KVCache, *works: tuple[Request, int]) -> list[torch.Tensor]:
    batch = [Scheduled(own, count) for own, count in works]
    for work in batch:
        assert cache.reserve(work.request, work.request.computed + work.count)
    logits = runner.run(batch, cache)
    for work in batch:
        work.request.computed += work.count
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_a_plain_forward(kind: str, make: Callable[[str], Base]) -> None:
    """Rows that come, go and outgrow their places, read in chunks of any size, through adapters or none."""
    base = make(kind)
    adapters = {f"a{i}": adapter(base.model, i, 2 + i, TARGETS.get(kind, "all-linear")) for i in range(3)}
    runner = ModelRunner(shared_copy(base.model))
    for name, own in adapters.items():
        runner.bank.add(name, own)
    cache = KVCache(runner.layout, 1 << 24)
    chance = random.Random(0)
    live: list[Request] = []
    found: dict[Request, list[torch.Tensor]] = {}
    keys = [(), (("a0", 1.0),), (("a1", 0.5), ("a2", -1.0)), (("a2", 2.0),)]
    made = [
        request([chance.randrange(3, VOCABULARY) for _ in range(length)], keys[i % 4])
        for i, length in enumerate((3, 40, 150, 17, 9, 70, 1, 129))
    ]
    for i in range(40):
        if i % 2 == 0 and made:
            live.append(made.pop())
        works = [
            (own, count)
            for own in chance.sample(live, len(live))
            if (count := min(own.pending, chance.choice([0, 1, 1, 4, 33])))
        ]
        for (own, _), logits in zip(works, step(runner, cache, *works) if works else (), strict=True):
            found.setdefault(own, []).append(logits)
        for own in [own for own in live if not own.pending]:
            live.remove(own)
            cache.release(own)
    done = {own: logits for own, logits in found.items() if not own.pending}
    assert len(done) >= 7
    for own, logits in done.items():
        with torch.no_grad(), routed(base, adapters, own.key):
            expected = base.model(torch.tensor([own.tokens])).logits[0]
        torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-4)


@contextmanager
def routed(base: Base, adapters: dict[str, Adapter], key: Key) -> Iterator[None]:
    """The same adapters on the base's own model."""
    bank = Bank(base.model)
    for name, _ in key:
        bank.add(name, adapters[name])
    with bank.route(dict(key) or None):
        yield
    bank.detach()


def test_base_rows_are_the_bases_bit_for_bit(base: Base) -> None:
    """Adapters beside them add nothing to them, not even a zero."""
    found = []
    for beside in ((), (("a0", 1.0),), (("a0", 1e38),)):
        runner = ModelRunner(shared_copy(base.model))
        runner.bank.add("a0", adapter(base.model, 0, 4))
        cache = KVCache(runner.layout, 1 << 24)
        own, other = request([5, 6, 7, 8]), request([5, 6, 7, 9], beside)
        found.append([*step(runner, cache, (own, 3), (other, 3)), *step(runner, cache, (own, 1), (other, 1))])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2])
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][2], found[2][2])
    assert not torch.equal(found[0][3], found[1][3])
    assert found[2][3].isnan().all()


def test_only_the_logits_that_are_asked_for_are_computed(base: Base) -> None:
    runner = ModelRunner(shared_copy(base.model))
    cache = KVCache(runner.layout, 1 << 24)
    own, other = request([5] * 9, sampling=SamplingParams()), request([6] * 4)
    assert [len(logits) for logits in step(runner, cache, (own, 5), (other, 3))] == [0, 3]
    assert [len(logits) for logits in step(runner, cache, (own, 4), (other, 1))] == [1, 1]
    assert [len(logits) for logits in step(runner, cache, (request([7, 8, 9], sampling=SamplingParams()), 2))] == [0]


# ---- what cannot be served


class Refusing(LlamaForCausalLM):
    """A model that fails when it is called so."""

    def forward(self, *args, **kwargs):
        raise IndexError("a bug of its own")


class Peeking(nn.Module):
    """A layer whose tokens look at each other outside of attention: rows side by side would see their neighbours."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + x.cumsum(-2))


def peeking(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[1].mlp.up_proj = Peeking(model.model.layers[1].mlp.up_proj)  # type: ignore[union-attr]
    return model


def test_models_that_would_come_out_otherwise_are_refused(base: Base) -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4))
    for model, why in (
        (mamba.eval(), "MambaForCausalLM cannot be served"),
        (Refusing(base.model.config).eval(), "a bug of its own"),
        (peeking(shared_copy(base.model)), "batched rows differ"),
    ):
        with pytest.raises(BaseModelError, match=why):
            ModelRunner(model)


def test_a_model_with_a_bank_is_refused(base: Base) -> None:
    ModelRunner(base.model)
    with pytest.raises(LoradeckError, match="already has a bank"):
        ModelRunner(base.model)


def test_attention_with_terms_of_its_own_is_refused(base: Base) -> None:
    model = shared_copy(base.model)
    layer = model.model.layers[0].self_attn
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, s_aux=torch.zeros(4), **kwargs)
    with pytest.raises(BaseModelError, match="unsupported argument s_aux"):
        ModelRunner(model)
