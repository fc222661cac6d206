"""Invariant 3 (docs/invariants.md): jobs trained together equal each trained alone.

One that joins, ends or fails does not affect the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck.base.fingerprint import fingerprint
from loradeck.base.load import Base
from loradeck.dataset.example import Example, Preference
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.events import AnyEvent, End
from loradeck.train.trainer import Trainer

pytestmark = pytest.mark.slow


@dataclass
class Spec:
    lora: LoraConfig
    train: TrainConfig
    data: Sequence[Example] | Sequence[Preference]
    valid: Sequence[Example] | Sequence[Preference] = field(default_factory=list)


@pytest.fixture
def specs(random_examples: Callable, random_pairs: Callable) -> dict[str, Spec]:
    """Jobs that differ in everything: rank, alpha, targets, dropout, rate, schedule, batch, steps, data, objective."""
    return {
        "a": Spec(
            LoraConfig(r=4, lora_dropout=0.3),
            TrainConfig(learning_rate=1e-2, batch_size=5, max_steps=9, seed=1, eval_every=3),
            random_examples(20, 1),
            random_examples(4, 2),
        ),
        "b": Spec(
            LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "up_proj"]),
            TrainConfig(learning_rate=3e-3, batch_size=3, max_steps=5, seed=2, loraplus_lr_ratio=4, schedule="cosine"),
            random_examples(13, 3),
        ),
        "c": Spec(
            LoraConfig(r=2, lora_dropout=0.1, use_rslora=True),
            TrainConfig(learning_rate=1e-3, batch_size=4, max_steps=7, weight_decay=0.1),
            random_pairs(10, 4),
            random_pairs(3, 5),
        ),
        "d": Spec(
            LoraConfig(r=16, lora_dropout=0.5, target_modules=["o_proj", "embed_tokens"]),
            TrainConfig(learning_rate=1e-3, batch_size=2, max_steps=6, max_grad_norm=0.1),
            random_examples(6, 6),
        ),
    }


Outcome = tuple[list[float], float | None, list[torch.Tensor]]


def outcome(
    base: Base, specs: dict[str, Spec], each_pass: Callable[[Trainer, int], None] | None = None, **settings: Any
) -> dict[str, Outcome]:
    bank = Bank(base.model)
    trainer = Trainer(base, bank, max_tokens=60, **settings)
    for name, spec in specs.items():
        add_job(trainer, name, spec)
    for passes in trainer:
        if each_pass:
            each_pass(trainer, passes)
    outcomes = {
        name: (job.progress.losses, job.progress.best_loss, [t.detach().clone() for _, t in job.adapter.tensors()])
        for name, job in trainer.jobs.items()
    }
    bank.detach()
    return outcomes


@pytest.fixture(scope="module")
def cache() -> dict[str, Outcome]:
    return {}


@pytest.fixture
def alone(base: Base, specs: dict[str, Spec], cache: dict[str, Outcome]) -> Callable[[str], Outcome]:
    """Return a function that trains a job alone on the tiny base, once for all tests of this file."""

    def train(name: str) -> Outcome:
        if name not in cache:
            cache[name] = outcome(base, {name: specs[name]})[name]
        return cache[name]

    return train


def add_job(trainer: Trainer, name: str, spec: Spec) -> None:
    trainer.bank.add(name, spec.lora, generator=torch.Generator().manual_seed(5))
    trainer.add(name, spec.data, spec.train, valid=spec.valid)


def check(together: Outcome, alone: Outcome) -> None:
    assert len(together[0]) == len(alone[0])
    assert together[0] == pytest.approx(alone[0], rel=1e-5, abs=1e-5)
    assert (together[1] is None) == (alone[1] is None)
    assert (together[1] or 0.0) == pytest.approx(alone[1] or 0.0, rel=1e-5, abs=1e-5)
    for one, other in zip(together[2], alone[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def gpt2(tokenizer: PreTrainedTokenizerFast) -> Base:
    """A base with dropout of its own, biases and another kind of linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
        )
    model.eval().requires_grad_(False)
    return Base(model, tokenizer, name="gpt2", source="gpt2", fingerprint=fingerprint(model))


def test_together_is_alone(base: Base, specs: dict[str, Spec], alone: Callable[[str], Outcome]) -> None:
    together = outcome(base, specs)
    for name in specs:
        check(together[name], alone(name))


@pytest.mark.parametrize("kind", ["padded", "gpt2"])
def test_together_is_alone_on_other_bases(
    base: Base, specs: dict[str, Spec], kind: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    if kind == "padded":
        base.model.set_attn_implementation("eager")
    if kind == "gpt2":
        base = gpt2(tiny_tokenizer)
        for name, targets in {"b": ["c_attn", "c_fc"], "d": ["c_proj", "wte"]}.items():
            specs[name].lora = replace(specs[name].lora, target_modules=targets)
    together = outcome(base, specs)
    for name, spec in specs.items():
        check(together[name], outcome(base, {name: spec})[name])


def test_beside_an_adapter_on_the_head(base: Base, specs: dict[str, Spec]) -> None:
    """The logits are then computed in another way, which rounds differently; Adam turns small gradients into large steps."""
    both = {"b": specs["b"], "d": replace(specs["d"], lora=LoraConfig(r=4, target_modules=["lm_head", "v_proj"]))}
    together = outcome(base, both)
    for name, spec in both.items():
        assert together[name][0] == pytest.approx(outcome(base, {name: spec})[name][0], abs=1e-4)


def test_dropout_has_an_effect(base: Base, specs: dict[str, Spec], alone: Callable[[str], Outcome]) -> None:
    spec = specs["a"]
    dry = Spec(replace(spec.lora, lora_dropout=0.0), spec.train, spec.data, spec.valid)
    assert outcome(base, {"a": dry})["a"][0][1:] != pytest.approx(alone("a")[0][1:], abs=1e-3)


def test_checkpointing_changes_nothing(base: Base, specs: dict[str, Spec], alone: Callable[[str], Outcome]) -> None:
    together = outcome(base, specs, gradient_checkpointing=True)
    for name in specs:
        check(together[name], alone(name))


def test_a_job_may_join_and_another_be_stopped(
    base: Base, specs: dict[str, Spec], alone: Callable[[str], Outcome]
) -> None:
    first = {name: specs[name] for name in ("a", "b")}

    def change(trainer: Trainer, passes: int) -> None:
        if passes == 2:
            trainer.stop("b", "enough")
            add_job(trainer, "c", specs["c"])

    together = outcome(base, first, change)
    for name in ("a", "c"):
        check(together[name], alone(name))
    assert together["b"][0] == pytest.approx(alone("b")[0][:2], abs=1e-5)


def test_one_that_diverges_fails_alone(base: Base, specs: dict[str, Spec], alone: Callable[[str], Outcome]) -> None:
    events: list[AnyEvent] = []

    def poison(trainer: Trainer, passes: int) -> None:
        if passes == 2:
            next(trainer.bank.parameters("b")).data[0, 0] = torch.nan

    together = outcome(base, specs, poison, on_event=events.append)
    ends = {event.job: event for event in events if isinstance(event, End)}
    assert (ends["b"].reason, ends["b"].step) == ("diverged", 2)
    assert "training 'b' diverged at step 3: " in ends["b"].detail
    for name in ("a", "c", "d"):
        assert ends[name].reason == "finished"
        check(together[name], alone(name))


def test_the_loss_of_preferences_begins_at_log_two_and_falls(
    base: Base, bank: Bank, random_pairs: Callable, tiny: LlamaForCausalLM
) -> None:
    trainer = Trainer(base, bank)
    config = TrainConfig(learning_rate=1e-2, batch_size=4, max_steps=30, dpo_beta=0.5, dpo_sft_weight=0)
    job = trainer.add("one", random_pairs(4, 1), config)
    for _ in trainer:
        pass
    assert job.progress.losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert job.progress.losses[-1] < 0.05
