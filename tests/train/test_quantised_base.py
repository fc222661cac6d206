"""Training on a base whose weights are quantised: the laws of any base, in little memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loradeck.base.load import Base
from loradeck.base.quantised import QuantisedWeight, quantisation
from loradeck.base.weights import prepare
from loradeck.dataset.example import Example
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.trainer import Trainer

CONFIG = TrainConfig(learning_rate=3e-3, batch_size=8, max_steps=6)
JOBS = {
    "a": LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear"),
    "b": LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"]),
}
SLACK = 24 << 20  # bytes: the room to decode in, and what the allocator keeps
Outcome = tuple[list[float], list[torch.Tensor]]


@pytest.fixture(params=["int8", "int4"])
def quantised(base: Base, request: pytest.FixtureRequest) -> Base:
    prepare(base.model, request.param)
    return base


@pytest.fixture
def plain(quantised: Base) -> Base:
    """The quantised base with its values in float32."""
    model = deepcopy(quantised.model)
    model.load_state_dict(quantised.model.state_dict())
    assert quantisation(model) is None
    return replace(quantised, model=model)


def train(base: Base, data: dict[str, list[Example]]) -> dict[str, Outcome]:
    bank = Bank(base.model)
    trainer = Trainer(base, bank)
    for name, examples in data.items():
        bank.add(name, JOBS[name], generator=torch.Generator().manual_seed(5))
        trainer.add(name, examples, CONFIG)
    assert sum(1 for _ in trainer) == CONFIG.max_steps
    outcomes = {
        name: (job.progress.losses, [tensor.detach().clone() for _, tensor in job.adapter.tensors()])
        for name, job in trainer.jobs.items()
    }
    bank.detach()
    return outcomes


@pytest.fixture
def data(random_examples: Callable[[int, int], list[Example]]) -> dict[str, list[Example]]:
    return {"a": random_examples(24, 1), "b": random_examples(17, 2)}


def test_the_losses_are_those_on_its_values(quantised: Base, plain: Base, data: dict[str, list[Example]]) -> None:
    found, expected = train(quantised, data), train(plain, data)
    for name in data:
        losses = expected[name][0]
        assert losses[0] != pytest.approx(losses[-1], rel=1e-3)
        assert found[name][0] == pytest.approx(losses, rel=1e-5, abs=1e-5)


def test_together_is_alone(quantised: Base, data: dict[str, list[Example]]) -> None:
    together = train(quantised, data)
    for name, examples in data.items():
        losses, tensors = train(quantised, {name: examples})[name]
        assert together[name][0] == pytest.approx(losses, rel=1e-5, abs=1e-5)
        for one, other in zip(together[name][1], tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_base_does_not_change(quantised: Base, data: dict[str, list[Example]]) -> None:
    before = {name: (id(each), each.detach().clone()) for name, each in quantised.model.named_parameters()}
    train(quantised, data)
    after = dict(quantised.model.named_parameters())
    assert any(isinstance(each, QuantisedWeight) for each in after.values())
    assert {name: id(each) for name, each in after.items()} == {name: own for name, (own, _) in before.items()}
    assert all(torch.equal(each, before[name][1]) for name, each in after.items())
    assert not any(each.grad is not None for each in after.values())


MEASURED = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from loradeck.base.load import Base
from loradeck.base.weights import prepare
from loradeck.dataset.example import Example
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.trainer import Trainer

def field(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) << 10

def train(size, layers, weights):
    config = LlamaConfig(
        vocab_size=8 * size, hidden_size=size, intermediate_size=4 * size, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    prepare(model, weights)
    base = Base(model, None, name="random", source="random", fingerprint="random")
    bank = Bank(model)
    bank.add("one", LoraConfig(r=4, target_modules="all-linear"))
    trainer = Trainer(base, bank)
    rows = [[(7 * i + j) % 256 for i in range(40)] for j in range(4)]
    trainer.add("one", [Example(row, row) for row in rows], TrainConfig(batch_size=4, max_steps=2))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    before = field("VmRSS:")
    for _ in trainer:
        pass
    return field("VmHWM:") - before, sum(each.nbytes for each in model.parameters())

train(256, 1, sys.argv[1])  # what is imported and compiled once
print(json.dumps(train(1024, 4, sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which says what the peak was")
def test_it_needs_no_more_memory_above_its_weights_than_a_plain_base() -> None:
    """300 MB in float32, of which the largest weight has 33."""
    above, weights = {}, {}
    for kind in ("plain", "int4"):
        done = subprocess.run([sys.executable, "-c", MEASURED, kind], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        above[kind], weights[kind] = json.loads(done.stdout)
    assert weights["int4"] < 0.2 * weights["plain"]
    assert above["int4"] < above["plain"] + SLACK < weights["plain"]
