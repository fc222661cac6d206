import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from loradeck.base.load import Base
from loradeck.base.text import encode
from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.errors import AdapterError, ConfigError, DataError, TrainingError, UnknownAdapterError
from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train import job
from loradeck.train.batching import collate
from loradeck.train.config import TrainConfig
from loradeck.train.events import AnyEvent, End, Evaluation, Step
from loradeck.train.trainer import Trainer, train

pytestmark = pytest.mark.slow

FAST = TrainConfig(learning_rate=1e-2, max_steps=60, batch_size=4)


def weights(adapter: Adapter) -> list[torch.Tensor]:
    return [tensor.detach().clone() for _, tensor in adapter.tensors()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_few_examples_are_memorised_with_their_ends(base: Base, bank: Bank, examples: list[Example]) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    result = train(base, bank, "one", examples, FAST)
    assert result.losses[-1] < 0.05
    assert (result.steps, result.interrupted, result.end.reason) == (60, False, "finished")
    assert result.tokens == 60 * sum(len(example.tokens) for example in examples)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not base.model.training
    assert all(parameter.grad is None for parameter in base.model.parameters())
    ids = torch.tensor([encode(base.tokenizer, "Bye")])
    with bank.route("one"):
        answer = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert base.tokenizer.decode(answer[0, ids.shape[1] :]) == "Fair winds<|im_end|>"


def test_the_same_seed_gives_the_same_adapter(base: Base, bank: Bank, examples: list[Example], tmp_path: Path) -> None:
    recipe = LoraConfig(r=4, lora_dropout=0.3)
    files = []
    for name, seed in [("first", 7), ("second", 7), ("third", 8)]:
        bank.add(name, recipe, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(len(files))  # the global generator does not matter
        train(base, bank, name, examples, TrainConfig(max_steps=5, batch_size=3, seed=seed))
        files.append((bank.save(name, tmp_path / name) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_the_global_generator_is_not_touched(base: Base, bank: Bank, examples: list[Example]) -> None:
    state = torch.get_rng_state()
    bank.add("drops", LoraConfig(r=2, lora_dropout=0.5), generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    train(base, bank, "drops", examples, TrainConfig(max_steps=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_other_adapters_are_not_changed(base: Base, bank: Bank, examples: list[Example]) -> None:
    other = bank.add("other", LoraConfig(r=2))
    before = weights(other)
    train(base, bank, "one", examples, TrainConfig(max_steps=2, weight_decay=0.5))
    assert same(weights(other), before)


@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_a_step_is_adamw_on_the_mean_over_supervised_tokens(base: Base, examples: list[Example], ratio: float) -> None:
    """Against a plain loop; and LoRA+. In float64: Adam divides small gradients by themselves."""
    base.model.double()
    bank = Bank(base.model)
    bank.add("one", LoraConfig(r=8), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        learning_rate=1e-3, max_steps=3, batch_size=4, weight_decay=0.1, max_grad_norm=0.5, loraplus_lr_ratio=ratio
    )
    twin = bank.add("twin", LoraConfig(r=8), generator=torch.Generator().manual_seed(0))
    assert same(weights(twin), weights(bank["one"]))
    losses = train(base, bank, "one", examples, config).losses
    split = [[twin.pair(path)[n] for path in twin.sites] for n in (0, 1)]
    groups = [{"params": matrices} for matrices in split]
    optimizer = torch.optim.AdamW(groups, betas=job.BETAS, weight_decay=0.1)
    batch = collate(examples, packed=False)
    for step, rate in enumerate([1e-3, 1e-3, 0.5e-3]):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, rate * ratio
        with bank.route("twin"):
            logits = base.model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=UNSUPERVISED)
            loss.backward()
        assert losses[step] == pytest.approx(loss.item(), abs=1e-7)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters() if p.grad is not None))
        assert norm > 0.5
        for parameter in twin.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5 / norm
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(weights(bank["one"]), weights(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_every_step_has_an_event(base: Base, bank: Bank, examples: list[Example]) -> None:
    events: list[AnyEvent] = []
    config = TrainConfig(learning_rate=1e-3, epochs=2, batch_size=3, warmup_ratio=0.5)
    result = train(base, bank, "one", examples, config, on_event=events.append)
    *steps, end = events
    assert all(isinstance(step, Step) for step in steps)
    assert [(step.step, step.steps) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [step.learning_rate for step in steps] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    assert [step.loss for step in steps] == result.losses
    assert steps[-1].tokens == result.tokens == 2 * sum(len(example.tokens) for example in examples)
    assert sum(step.supervised for step in steps) == 2 * sum(example.supervised for example in examples)
    assert steps[0].grad_norm > 0
    assert steps[0].memory > 1e7
    assert sorted(step.seconds for step in steps) == [step.seconds for step in steps]
    assert 0 < sum(step.took for step in steps) <= steps[-1].seconds
    assert (end, end.reason, end.kept) == (result.end, "finished", 4)


def test_micro_batches_add_up_to_the_whole_step(base: Base, bank: Bank, random_examples: Callable) -> None:
    """Token-exact: however a ragged batch is split, its gradient is that of all its tokens at once."""
    data, config = random_examples(24, 1), TrainConfig(learning_rate=1e-2, max_steps=4, batch_size=12)
    outcomes = []
    for name, tokens in [("whole", 10_000), ("split", 40), ("one by one", 1)]:
        bank.add(name.replace(" ", "-"), LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
        trainer = Trainer(base, bank, max_tokens=tokens)
        added = trainer.add(name.replace(" ", "-"), data, config)
        for _ in trainer:
            pass
        outcomes.append((added.progress.losses, weights(bank[added.name])))
    for losses, tensors in outcomes[1:]:
        assert losses == pytest.approx(outcomes[0][0], abs=1e-5)
        for one, other in zip(tensors, outcomes[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_base_that_cannot_be_packed_is_padded(base: Base, bank: Bank, examples: list[Example]) -> None:
    bank.add("two", LoraConfig(r=8), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(learning_rate=1e-2, max_steps=15, batch_size=4)
    packed = train(base, bank, "one", examples, config)
    base.model.set_attn_implementation("eager")
    padded = train(base, bank, "two", examples, config)
    assert base.model.config._attn_implementation == "eager"
    assert padded.losses == pytest.approx(packed.losses, abs=1e-3)


class TestValidation:
    def run(self, base: Base, bank: Bank, random_examples: Callable, **config: Any) -> tuple[list[AnyEvent], Trainer]:
        events: list[AnyEvent] = []
        trainer = Trainer(base, bank, on_event=events.append)
        trainer.add(
            "one",
            random_examples(8, 1),
            TrainConfig(learning_rate=3e-2, batch_size=4, **config),
            valid=random_examples(5, 2),
        )
        for _ in trainer:
            pass
        return events, trainer

    def test_the_best_adapter_is_kept(self, base: Base, bank: Bank, random_examples: Callable) -> None:
        """Memorised random examples do not generalise, so the best is not the last."""
        events, trainer = self.run(base, bank, random_examples, max_steps=30, eval_every=5)
        evaluations = [event for event in events if isinstance(event, Evaluation)]
        assert [event.step for event in evaluations] == [5, 10, 15, 20, 25, 30]
        losses = [event.loss for event in evaluations]
        assert [event.best for event in evaluations] == [loss == min(losses[: n + 1]) for n, loss in enumerate(losses)]
        best = evaluations[losses.index(min(losses))]
        assert best.step < 30
        end = events[-1]
        assert isinstance(end, End)
        assert (end.kept, trainer.jobs["one"].progress.best_loss) == (best.step, best.loss)
        valid = collate(random_examples(5, 2), packed=False)
        with bank.route("one"):
            loss = base.model(valid.input_ids, attention_mask=valid.attention_mask, labels=valid.labels).loss
        assert loss.item() == pytest.approx(best.loss, abs=1e-4)

    def test_patience_ends_it(self, base: Base, bank: Bank, random_examples: Callable) -> None:
        events, _ = self.run(base, bank, random_examples, max_steps=100, eval_every=5, patience=2)
        end = events[-1]
        assert isinstance(end, End)
        assert (end.reason, end.step) == ("early stop", end.kept + 10)
        assert "2 evaluations without a loss below" in end.detail

    def test_the_last_step_is_evaluated_and_the_default_is_ten(
        self, base: Base, bank: Bank, random_examples: Callable
    ) -> None:
        events, _ = self.run(base, bank, random_examples, max_steps=24)
        assert [event.step for event in events if isinstance(event, Evaluation)] == [3, 6, 9, 12, 15, 18, 21, 24]
        events, _ = self.run(base, _another(bank), random_examples, max_steps=7, eval_every=5)
        assert [event.step for event in events if isinstance(event, Evaluation)] == [5, 7]


def _another(bank: Bank) -> Bank:
    bank.unload("one")
    bank.add("one", LoraConfig(r=8), generator=torch.Generator().manual_seed(0))
    return bank


def test_the_model_is_in_training_mode_during_training(base: Base, bank: Bank, examples: list[Example]) -> None:
    modes = []
    train(base, bank, "one", examples, TrainConfig(max_steps=1), on_event=lambda _: modes.append(base.model.training))
    assert modes == [True, True] or modes == [True, False]
    assert not base.model.training


def test_an_interrupt_leaves_complete_steps(base: Base, bank: Bank, examples: list[Example], tmp_path: Path) -> None:
    def interrupt(event: AnyEvent) -> None:
        if isinstance(event, Step) and event.step == 2:
            signal.raise_signal(signal.SIGINT)

    bank.add("twin", LoraConfig(r=8), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(learning_rate=1e-3, max_steps=2, schedule="constant", warmup_ratio=0)
    train(base, bank, "twin", examples, config)
    longer = TrainConfig(learning_rate=1e-3, max_steps=9, schedule="constant", warmup_ratio=0)
    handler = signal.getsignal(signal.SIGINT)
    result = train(base, bank, "one", examples, longer, on_event=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (result.interrupted, result.steps) == (True, 2)
    assert same(weights(bank["one"]), weights(bank["twin"]))
    assert not base.model.training
    bank.save("one", tmp_path / "one")


def test_a_second_interrupt_drops_the_step(
    base: Base, bank: Bank, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = weights(bank["one"])
    monkeypatch.setattr(job.Job, "update", twice)
    result = train(base, bank, "one", examples, FAST)
    assert (result.interrupted, result.steps) == (True, 0)
    assert same(weights(bank["one"]), before)
    assert all(parameter.grad is None for parameter in bank.parameters("one"))


def test_a_nan_loss_ends_training_before_the_step(base: Base, bank: Bank, examples: list[Example]) -> None:
    before = weights(bank["one"])
    torch.nn.init.constant_(base.model.model.norm.weight, math.inf)
    with pytest.raises(TrainingError, match="training 'one' diverged at step 1: the loss is nan") as caught:
        train(base, bank, "one", examples, FAST)
    assert "Lower learning_rate" in caught.value.hint
    assert same(weights(bank["one"]), before)
    assert not base.model.training


def test_invalid_jobs_are_refused(base: Base, bank: Bank, examples: list[Example], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no examples"):
        train(base, bank, "one", [], FAST)
    with pytest.raises(ConfigError, match="the longest example has 300 tokens; the context of tiny is 256"):
        train(base, bank, "one", [Example([3] * 300, [3] * 300)], FAST)
    with pytest.raises(ConfigError, match="the longest example has 300 tokens; the context of tiny is 256"):
        train(base, bank, "one", examples, FAST, valid=[Example([3] * 300, [3] * 300)])
    with pytest.raises(UnknownAdapterError):
        train(base, bank, "two", examples, FAST)
    bank.load(bank.save("one", tmp_path / "saved"))
    with pytest.raises(AdapterError, match="frozen"):
        train(base, bank, "saved", examples, FAST)
    trainer = Trainer(base, bank)
    trainer.add("one", examples, FAST)
    with pytest.raises(ConfigError, match="already has a job"):
        trainer.add("one", examples, FAST)
