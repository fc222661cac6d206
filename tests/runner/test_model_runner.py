"""A step's logits are those of a plain forward, however its rows lie and whatever else is computed."""

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tiny_models import MODELS, SHAPE, TARGETS, VOCABULARY, adapter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from loradeck import Adapter, Bank, Base
from loradeck.base.weights import Weights, prepare, shared_copy
from loradeck.errors import BaseModelError, LoradeckError
from loradeck.runner.interface import Cache, Runner
from loradeck.runner.model_runner import ModelRunner
from loradeck.runner.native_runner import NativeRunner
from loradeck.runner.request import Key, Request, Scheduled
from loradeck.sampling import SamplingParams

ALL = SamplingParams(prompt_logprobs=0)  # logits of every position
RUNNERS: dict[str, Callable[[PreTrainedModel], Runner]] = {
    "eager": ModelRunner,
    "native": lambda model: NativeRunner(ModelRunner(model)),
}
every_runner = pytest.mark.parametrize("make_runner", RUNNERS.values(), ids=RUNNERS)


def request(tokens: list[int], key=(), sampling: SamplingParams = ALL) -> Request:
    return Request(tokens, sampling, key)


def step(runner: Runner, cache: Cache, *works: tuple[Request, int]) -> list[torch.Tensor]:
    batch = [Scheduled(own, count) for own, count in works]
    for work in batch:
        assert cache.reserve(work.request, work.request.computed + work.count)
    logits = runner.run(batch, cache)
    for work in batch:
        work.request.computed += work.count
    return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "make_runner"),
    [
        pytest.param(kind, make_runner, id=f"{kind}, {name}")
        for kind in MODELS
        for name, make_runner in RUNNERS.items()
        if (kind, name) != ("gpt2", "native")  # has no rotary embedding, which the step's definition needs
    ],
)
def test_logits_are_those_of_a_plain_forward(
    kind: str, make_runner: Callable[[PreTrainedModel], Runner], make: Callable[[str], Base]
) -> None:
    """Rows that come, go and outgrow their places, read in chunks of any size, through adapters or none."""
    base = make(kind)
    adapters = {f"a{i}": adapter(base.model, i, 2 + i, TARGETS.get(kind, "all-linear")) for i in range(3)}
    runner = make_runner(shared_copy(base.model))
    for name, own in adapters.items():
        runner.bank.add(name, own)
    cache = runner.new_cache(1 << 24)
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


@every_runner
def test_base_rows_are_the_bases_bit_for_bit(base: Base, make_runner: Callable[[PreTrainedModel], Runner]) -> None:
    """Adapters beside them add nothing to them, not even a zero."""
    found = []
    for beside in ((), (("a0", 1.0),), (("a0", 1e38),)):
        runner = make_runner(shared_copy(base.model))
        runner.bank.add("a0", adapter(base.model, 0, 4))
        cache = runner.new_cache(1 << 24)
        own, other = request([5, 6, 7, 8]), request([5, 6, 7, 9], beside)
        found.append([*step(runner, cache, (own, 3), (other, 3)), *step(runner, cache, (own, 1), (other, 1))])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2])
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][2], found[2][2])
    assert not torch.equal(found[0][3], found[1][3])
    assert found[2][3].isnan().all()


@every_runner
def test_only_the_logits_that_are_asked_for_are_computed(
    base: Base, make_runner: Callable[[PreTrainedModel], Runner]
) -> None:
    runner = make_runner(shared_copy(base.model))
    cache = runner.new_cache(1 << 24)
    own, other = request([5] * 9, sampling=SamplingParams()), request([6] * 4)
    assert [len(logits) for logits in step(runner, cache, (own, 5), (other, 3))] == [0, 3]
    assert [len(logits) for logits in step(runner, cache, (own, 4), (other, 1))] == [1, 1]
    assert [len(logits) for logits in step(runner, cache, (request([7, 8, 9], sampling=SamplingParams()), 2))] == [0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("weights", ["plain", "packed", "blocks"])
@every_runner
def test_an_adapter_of_the_head_applies_to_the_tokens_that_reach_it(
    make_runner: Callable[[PreTrainedModel], Runner], weights: Weights, tied: bool, tmp_path: Path
) -> None:
    """The head gets the scored tokens only, in some steps none, and rows through several adapters."""
    wide = {**SHAPE, "vocab_size": 1024, "tie_word_embeddings": tied}  # large enough for its head to be packed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**wide)).eval().requires_grad_(False)
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18, 19], [20, 21, 22]]
    names = ["head", "inner", None, "both"]
    targets = {"head": ["lm_head"], "inner": ["q_proj", "up_proj"], "both": ["lm_head", "down_proj", "embed_tokens"]}
    with warnings.catch_warnings(), torch.no_grad():  # what PEFT says of its own doings is not our matter here
        warnings.simplefilter("ignore")
        for seed, (name, modules) in enumerate(targets.items()):
            torch.manual_seed(seed)
            config = LoraConfig(r=3 + seed, target_modules=modules, init_lora_weights=False)
            get_peft_model(shared_copy(model), config).save_pretrained(tmp_path / name)
        expected = [
            (PeftModel.from_pretrained(shared_copy(model), tmp_path / name) if name else model)(
                torch.tensor([row])
            ).logits[0]
            for name, row in zip(names, rows, strict=True)
        ]
    prepare(model, weights)
    runner = make_runner(shared_copy(model))
    for name in targets:
        runner.bank.load(tmp_path / name)
    cache = runner.new_cache(1 << 24)
    sampling = [SamplingParams(), SamplingParams(), ALL, SamplingParams()]
    requests = [
        request(row, ((name, 1.0),) if name else (), own) for row, name, own in zip(rows, names, sampling, strict=True)
    ]
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for counts in ((3, 0, 0, 2), (2, 4, 0, 0), (1, 0, 3, 1), (0, 0, 2, 0)):
        works = [(own, count) for own, count in zip(requests, counts, strict=True) if count]
        for (own, _), logits in zip(works, step(runner, cache, *works), strict=True):
            found[requests.index(own)].append(logits)
    for i, (own, logits) in enumerate(zip(requests, found, strict=True)):
        assert not own.pending
        wanted = expected[i] if own.sampling is ALL else expected[i][-1:]
        torch.testing.assert_close(torch.cat(logits), wanted, rtol=1e-4, atol=1e-4)


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
