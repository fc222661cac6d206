import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from loradeck.base.load import Base
from loradeck.base.text import encode
from loradeck.errors import AdapterError, ConfigError, DataError, LoradeckError, UnknownAdapterError
from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train import trainer
from loradeck.train.batching import collate
from loradeck.train.config import TrainConfig
from loradeck.train.example import Example
from loradeck.train.trainer import Step, train

FAST = TrainConfig(learning_rate=1e-2, max_steps=60, batch_size=4)


def weights(adapter: Adapter) -> list[torch.Tensor]:
    return [tensor.detach().clone() for _, tensor in adapter.tensors()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_few_examples_are_learned_by_heart_with_their_ends(base: Base, bank: Bank, examples: list[Example]) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    result = train(base, bank, "one", examples, FAST)
    assert result.losses[-1] < 0.05
    assert (result.steps, result.interrupted) == (60, False)
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
        torch.manual_seed(len(files))  # chance elsewhere is no matter
        train(base, bank, name, examples, TrainConfig(max_steps=5, batch_size=3, seed=seed))
        files.append((bank.save(name, tmp_path / name) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_chance_elsewhere_is_left_as_it_was(base: Base, bank: Bank, examples: list[Example]) -> None:
    state = torch.get_rng_state()
    train(base, bank, "one", examples, TrainConfig(max_steps=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_other_adapters_are_not_touched(base: Base, bank: Bank, examples: list[Example]) -> None:
    other = bank.add("other", LoraConfig(r=2))
    before = weights(other)
    train(base, bank, "one", examples, TrainConfig(max_steps=2, weight_decay=0.5))
    assert same(weights(other), before)


def test_a_step_is_adamw_on_the_mean_over_supervised_tokens(base: Base, bank: Bank, examples: list[Example]) -> None:
    """Against a plain loop on the model's own loss."""
    config = TrainConfig(learning_rate=1e-3, max_steps=3, batch_size=4, weight_decay=0.1, max_grad_norm=0.5)
    twin = bank.add("twin", LoraConfig(r=8), generator=torch.Generator().manual_seed(0))
    assert same(weights(twin), weights(bank["one"]))
    losses = train(base, bank, "one", examples, config).losses
    optimizer = torch.optim.AdamW(twin.parameters(), betas=trainer.BETAS, weight_decay=0.1)
    batch = collate(examples)
    for step, rate in enumerate([1e-3, 1e-3, 0.5e-3]):
        optimizer.param_groups[0]["lr"] = rate
        with bank.route("twin"):
            loss = base.model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
            loss.backward()
        assert losses[step] == pytest.approx(loss.item(), abs=1e-5)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters() if p.grad is not None))
        assert norm > 0.5
        for parameter in twin.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5 / norm
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(weights(bank["one"]), weights(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_step_is_told(base: Base, bank: Bank, examples: list[Example]) -> None:
    steps: list[Step] = []
    config = TrainConfig(learning_rate=1e-3, epochs=2, batch_size=3, warmup_ratio=0.5)
    result = train(base, bank, "one", examples, config, on_step=steps.append)
    assert [(step.step, step.steps) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [step.learning_rate for step in steps] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    assert [step.loss for step in steps] == result.losses
    assert steps[-1].tokens == result.tokens == 2 * sum(len(example.tokens) for example in examples)
    assert steps[-1].seconds == result.seconds
    assert steps[-1].tokens_per_second == result.tokens / result.seconds


def test_the_model_is_in_training_mode_meanwhile(base: Base, bank: Bank, examples: list[Example]) -> None:
    modes = []
    train(base, bank, "one", examples, TrainConfig(max_steps=1), on_step=lambda _: modes.append(base.model.training))
    assert modes == [True]
    assert not base.model.training


def test_an_interrupt_leaves_whole_steps(base: Base, bank: Bank, examples: list[Example], tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    bank.add("twin", LoraConfig(r=8), generator=torch.Generator().manual_seed(0))
    config = TrainConfig(learning_rate=1e-3, max_steps=2, schedule="constant", warmup_ratio=0)
    train(base, bank, "twin", examples, config)
    longer = TrainConfig(learning_rate=1e-3, max_steps=9, schedule="constant", warmup_ratio=0)
    result = train(base, bank, "one", examples, longer, on_step=interrupt)
    assert (result.interrupted, result.steps) == (True, 2)
    assert same(weights(bank["one"]), weights(bank["twin"]))
    assert not base.model.training
    bank.save("one", tmp_path / "one")


def test_an_interrupt_within_a_step_undoes_it(
    base: Base, bank: Bank, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = weights(bank["one"])
    monkeypatch.setattr(trainer, "_check_finite", interrupt)
    result = train(base, bank, "one", examples, FAST)
    assert (result.interrupted, result.steps) == (True, 0)
    assert same(weights(bank["one"]), before)
    assert all(parameter.grad is None for parameter in bank.parameters("one"))


def test_a_loss_that_is_no_number_stops_before_its_step(base: Base, bank: Bank, examples: list[Example]) -> None:
    before = weights(bank["one"])
    torch.nn.init.constant_(base.model.model.norm.weight, math.inf)
    with pytest.raises(LoradeckError, match="training 'one' diverged at step 1: the loss is nan") as caught:
        train(base, bank, "one", examples, FAST)
    assert "Lower learning_rate" in caught.value.mend
    assert same(weights(bank["one"]), before)
    assert not base.model.training


def test_what_cannot_be_trained_is_refused(
    base: Base, bank: Bank, examples: list[Example], tmp_path: Path, tiny: LlamaForCausalLM
) -> None:
    with pytest.raises(DataError, match="no examples"):
        train(base, bank, "one", [], FAST)
    with pytest.raises(ConfigError, match="the longest example has 300 tokens; tiny reads 256"):
        train(base, bank, "one", [Example([3] * 300, [3] * 300)], FAST)
    with pytest.raises(UnknownAdapterError):
        train(base, bank, "two", examples, FAST)
    bank.load(bank.save("one", tmp_path / "saved"))
    with pytest.raises(AdapterError, match="frozen"):
        train(base, bank, "saved", examples, FAST)
