"""What goes to the compiled step and what to transformers' modules, and that a request's bits are its own."""

import copy
import logging
import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.tiny_models import VOCABULARY, adapter

from loradeck import Base
from loradeck.base.blocked import BlockWeight
from loradeck.base.load import SMOLLM2
from loradeck.base.weights import Weights, prepare, shared_copy
from loradeck.errors import ConfigError
from loradeck.native import model, step
from loradeck.native.library import int8_pays, library, options_for
from loradeck.runner import trial
from loradeck.runner.choice import runner_of
from loradeck.runner.model_runner import ModelRunner
from loradeck.runner.native_batch import native_model
from loradeck.runner.native_runner import NativeRunner
from loradeck.runner.request import Key, Request, Scheduled
from loradeck.sampling import SamplingParams


@pytest.fixture
def runner(base: Base) -> NativeRunner:
    return runner_with_adapters(base)


def runner_with_adapters(base: Base) -> NativeRunner:
    runner = NativeRunner(ModelRunner(shared_copy(base.model)))
    runner.bank.add("a0", adapter(base.model, 0, 4))
    runner.bank.add("a1", adapter(base.model, 1, 6))
    runner.bank.add("head", adapter(base.model, 2, 3, ["lm_head", "q_proj"]))
    return runner


def read(
    runner: NativeRunner, beside: list[tuple[list[int], Key]], tokens: list[int], key: Key, rng: random.Random
) -> torch.Tensor:
    """Return the logits of all of a prompt's tokens, read in random chunks with others beside."""
    cache = runner.new_cache(1 << 26)
    subject = Request(tokens, SamplingParams(prompt_logprobs=0), key)
    requests = [subject, *(Request(others, SamplingParams(prompt_logprobs=0), theirs) for others, theirs in beside)]
    pieces = []
    while subject.pending:
        batch = [
            Scheduled(each, rng.randint(1, each.pending))
            for each in rng.sample(requests, len(requests))
            if each.pending and (each is subject or rng.random() < 0.7)
        ]
        for work in batch:
            assert cache.reserve(work.request, work.request.computed + work.count)
        for work, logits in zip(batch, runner.run(batch, cache), strict=True):
            if work.request is subject:
                pieces.append(logits)
            work.request.computed += work.count
    return torch.cat(pieces)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3-moe"])
def test_a_request_has_the_same_bits_in_any_batch_and_any_chunks(kind: str, make: Callable[[str], Base]) -> None:
    runner = runner_with_adapters(make(kind))
    rng = random.Random(0)
    keys: list[Key] = [(), (("a0", 1.0),), (("a0", 0.5), ("a1", -1.0)), (("a1", 2.0),)]

    def prompt() -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 90))]

    for key in keys:
        tokens = prompt()
        alone = read(runner, [], tokens, key, rng)
        for _ in range(4):
            beside = [(prompt(), rng.choice(keys)) for _ in range(rng.randint(0, 12))]
            assert torch.equal(read(runner, beside, tokens, key, rng), alone)


def test_only_requests_of_adapters_it_does_not_know_leave_the_compiled_step(
    runner: NativeRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[int] = []
    run = step.run

    def counted(model, chunks, threads) -> torch.Tensor:
        steps.append(len(chunks))
        return run(model, chunks, threads)

    monkeypatch.setattr(step, "run", counted)
    cache = runner.new_cache(1 << 24)
    batch = [Scheduled(Request([5, 6, 7], key=key), 3) for key in ((), (("head", 1.0),), (("a0", 1.0),))]
    for work in batch:
        assert cache.reserve(work.request, 3)
    with caplog.at_level(logging.INFO):
        logits = runner.run(batch, cache)
    assert steps == [2]
    assert "it adapts lm_head" in caplog.text
    assert not torch.equal(logits[0], logits[1])


def test_a_model_that_cannot_be_described_is_computed_by_its_modules_and_the_log_says_why(
    make: Callable[[str], Base], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert isinstance(runner_of(shared_copy(make("gpt2").model)), ModelRunner)
    assert "GPT2LMHeadModel is computed by transformers' modules: " in caplog.text


def test_a_step_that_computes_something_else_is_not_used(
    base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A miscompiled step, say."""
    run = step.run
    monkeypatch.setattr(step, "run", lambda *arguments: run(*arguments) * 1.01)
    with caplog.at_level(logging.INFO):
        assert isinstance(runner_of(shared_copy(base.model)), ModelRunner)
    assert "batched rows differ" in caplog.text


def test_eager_is_enforced(base: Base) -> None:
    choose = partial(runner_of, shared_copy(base.model))
    assert isinstance(choose(enforce_eager=True), ModelRunner)


def test_weights_in_blocks_are_not_copied(base: Base) -> None:
    prepare(base.model, "blocks")
    runner = NativeRunner(ModelRunner(shared_copy(base.model)))
    packed = {tensor.data_ptr() for tensor in runner.native._memory}
    weights = [weight for weight in base.model.parameters() if isinstance(weight, BlockWeight)]
    assert len(weights) == 15
    widths_that_need_no_padding = [weight for weight in weights if weight.data_ptr() in packed]
    assert len(widths_that_need_no_padding) == 7  # the head, gate, up and down; heads of 16 are padded one by one


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "olmoe"])
def test_there_is_one_copy_of_the_experts(kind: str, make: Callable[[str], Base]) -> None:
    model = make(kind).model
    size = sum(parameter.nbytes for name, parameter in model.named_parameters() if ".experts." in name)
    prepare(model, "blocks")
    runner = NativeRunner(ModelRunner(shared_copy(model)))
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    assert sum(parameter.nbytes for parameter in experts) == size
    storages = {parameter.untyped_storage().data_ptr() for parameter in experts}
    tensors = {tensor.data_ptr(): tensor for tensor in runner.native._memory}.values()
    shared = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() in storages]
    others = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in storages]
    assert sum(tensor.nbytes for tensor in shared) == size  # all of it, each part once
    assert sum(tensor.nbytes for tensor in others) < sum(
        2 * parameter.nbytes for name, parameter in model.named_parameters() if ".experts." not in name
    )  # heads of 16 are padded to 32


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "olmoe"])
def test_a_mixture_of_experts_through_adapters_of_peft(kind: str, make: Callable[[str], Base], tmp_path: Path) -> None:
    base = make(kind)
    targets = {"one": ["q_proj", "v_proj"], "all": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    names = ["one", None, "all", "one"]
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17], [18]]
    with warnings.catch_warnings(), torch.no_grad():  # what PEFT says of its own doings is not our matter here
        warnings.simplefilter("ignore")
        for seed, (name, modules) in enumerate(targets.items()):
            torch.manual_seed(seed)
            config = LoraConfig(r=3 + seed, target_modules=modules, init_lora_weights=False)
            get_peft_model(copy.deepcopy(base.model), config).save_pretrained(tmp_path / name)
        expected = [
            (PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / name) if name else base.model)(
                torch.tensor([row])
            ).logits[0]
            for name, row in zip(names, rows, strict=True)
        ]
    prepare(base.model, "blocks")
    runner = NativeRunner(ModelRunner(shared_copy(base.model)))
    for name in targets:
        runner.bank.load(tmp_path / name)
    cache = runner.new_cache(1 << 24)
    every = SamplingParams(prompt_logprobs=0)
    requests = [Request(row, every, ((name, 1.0),) if name else ()) for row, name in zip(rows, names, strict=True)]
    for each in requests:
        assert cache.reserve(each, len(each.tokens))
    found = runner.run([Scheduled(each, len(each.tokens)) for each in requests], cache)
    assert all(runner._packed(runner.bank[name]) for name in targets)
    for logits, own in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)


@pytest.mark.real
def test_the_real_base_in_int8_is_computed_natively() -> None:
    base = Base.load(SMOLLM2, dtype="float32", device="cpu", weights="int8")
    assert isinstance(runner_of(base.model), NativeRunner)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantised_base_has_all_its_tokens(base: Base, weights: Weights) -> None:
    prepare(base.model, weights)
    assert runner_of(base.model).vocabulary == VOCABULARY


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_int8_activations_are_taken_for_quantised_weights(
    base: Base, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(base.model, weights)
    with caplog.at_level(logging.INFO):
        runner = runner_of(shared_copy(base.model), activations="int8")
        plain = runner_of(shared_copy(base.model), activations="plain")
    assert isinstance(runner, NativeRunner)
    assert isinstance(plain, NativeRunner)
    assert runner.native.int8
    assert not plain.native.int8
    assert "computed natively, with int8 activations, by" in caplog.text
    logits = [logits_of(each, [5, 6, 7, 8, 9]) for each in (runner, plain)]
    assert not torch.equal(*logits)
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[1].norm()


def logits_of(runner: NativeRunner, tokens: list[int]) -> torch.Tensor:
    cache, request = runner.new_cache(1 << 20), Request(tokens, SamplingParams(prompt_logprobs=0))
    assert cache.reserve(request, len(tokens))
    return runner.run([Scheduled(request, len(tokens))], cache)[0]


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_by_default_int8_activations_are_taken_where_they_were_measured(
    base: Base, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    prepare(base.model, "int8")
    compiled = library(options_for(halves=False))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert int8_pays(halves=False) == (capability != "DEFAULT")
    assert not int8_pays(halves=True)
    monkeypatch.setattr(model, "int8_pays", lambda halves: capability == "AVX2")
    monkeypatch.setattr(model, "library", lambda _: compiled)
    runner = runner_of(shared_copy(base.model))
    assert isinstance(runner, NativeRunner)
    assert runner.native.int8 == (capability == "AVX2")


def test_int8_activations_that_fail_the_trial_are_given_up_unless_they_are_asked_for(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(base.model, "int8")
    monkeypatch.setattr(model, "int8_pays", lambda halves: True)
    assert runner_of(shared_copy(base.model)).native.int8
    assert native_model(shared_copy(base.model)).int8
    monkeypatch.setattr(trial, "INT8_TOLERANCE", -1.0)
    runner = runner_of(shared_copy(base.model))
    assert isinstance(runner, NativeRunner)
    assert not runner.native.int8
    assert not native_model(shared_copy(base.model)).int8
    with pytest.raises(ConfigError, match="takes no int8 activations"):
        runner_of(shared_copy(base.model), activations="int8")


@pytest.mark.parametrize("case", ["plain weights", "blocks", "eager", "unknown model"])
def test_int8_activations_are_refused_where_nothing_takes_them(
    base: Base, make: Callable[[str], Base], case: str
) -> None:
    chosen = make("gpt2") if case == "unknown model" else base
    if case in ("blocks", "eager"):
        prepare(chosen.model, "blocks" if case == "blocks" else "int8")
    with pytest.raises(ConfigError, match="takes no int8 activations"):
        runner_of(shared_copy(chosen.model), enforce_eager=case == "eager", activations="int8")


def test_generate_takes_activations_too(base: Base) -> None:
    with pytest.raises(ConfigError, match="takes no int8 activations: its weights are not quantised"):
        native_model(base.model, "int8")
    prepare(base.model, "int8")
    for activations, int8 in (("int8", True), ("plain", False), ("int8", True)):
        native = native_model(base.model, activations)
        assert native is not None
        assert native.int8 == int8
        assert native_model(base.model, activations) is native
