"""Trainings that one process, or several, run the same: `python -m tests.train.scenarios FOLDER`, started by torchrun."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tests.tiny_models import SHAPE
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loradeck import Bank, Base, LoraConfig
from loradeck.base.fingerprint import fingerprint
from loradeck.dataset.example import UNSUPERVISED, Example, Preference
from loradeck.dataset.labelled_example import LabelledExample
from loradeck.errors import TrainingError
from loradeck.train.config import TrainConfig
from loradeck.train.group import Group, process_group
from loradeck.train.sharding import shard_layers
from loradeck.train.trainer import Trainer

PROMPT = 3
Outcome = dict[str, torch.Tensor]


def examples(count: int, seed: int, *, shortest: int = 5, longest: int = 40) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 260, (length,), generator=generator).tolist() for length in lengths]
    return [Example(row, [UNSUPERVISED] * PROMPT + row[PROMPT:]) for row in rows]


def pairs(count: int, seed: int) -> list[Preference]:
    return [
        Preference(one, Example(one.tokens[:PROMPT] + other.tokens[PROMPT:], other.labels))
        for one, other in zip(examples(count, seed), examples(count, seed + 1000), strict=True)
    ]


def model(dtype: torch.dtype, kind: Callable[[LlamaConfig], PreTrainedModel] = LlamaForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(LlamaConfig(**SHAPE, pad_token_id=0, num_labels=3)).eval().requires_grad_(False).to(dtype)


def base_of(model: PreTrainedModel, task: str = "generate") -> Base:
    return Base(model, None, name="tiny", source="tiny", fingerprint=fingerprint(model), task=task)  # type: ignore[arg-type]


def outcome(trainer: Trainer) -> Outcome:
    for _ in trainer:
        pass
    return {
        f"{name} {key}": tensor
        for name, job in trainer.jobs.items()
        for key, tensor in [
            ("losses", torch.tensor(job.progress.losses, dtype=torch.float64)),
            ("validation", torch.tensor([*job.progress.validation.values()], dtype=torch.float64)),
            *((key, tensor.detach().clone()) for key, tensor in job.adapter.tensors()),
        ]
    }


def language(group: Group, dtype: torch.dtype, *, shard: bool = False, gradient_checkpointing: bool = False) -> Outcome:
    """Jobs that differ in rank, dropout, objective, batch and length; one has fewer sequences than processes."""
    base = base_of(model(dtype))
    if shard:
        shard_layers(base.model, group)
    bank = Bank(base.model)
    trainer = Trainer(base, bank, max_tokens=128, group=group, gradient_checkpointing=gradient_checkpointing)
    for name, lora, train, data, valid in (
        ("a", LoraConfig(r=4, lora_dropout=0.3), TrainConfig(batch_size=5, max_steps=6, eval_every=2, seed=1), examples(20, 1), examples(4, 2)),
        ("b", LoraConfig(r=8, target_modules=["q_proj", "up_proj"]), TrainConfig(batch_size=1, max_steps=3, loraplus_lr_ratio=4), examples(3, 3), []),
        ("c", LoraConfig(r=2, lora_dropout=0.1), TrainConfig(batch_size=4, max_steps=5, weight_decay=0.1, patience=1), pairs(10, 4), pairs(3, 5)),
    ):  # fmt: skip
        bank.add(name, lora, generator=torch.Generator().manual_seed(0))
        trainer.add(name, data, train, valid=valid)
    return outcome(trainer)


def classifier(group: Group) -> Outcome:
    base = base_of(model(torch.float64, AutoModelForSequenceClassification.from_config), "classify")
    bank = Bank(base.model)
    bank.add("a", LoraConfig(r=4), num_labels=3, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(base, bank, group=group)
    data = [
        LabelledExample(each.tokens, [UNSUPERVISED] * (len(each.tokens) - 1) + [each.tokens[0] % 3])
        for each in examples(12, 7)
    ]
    trainer.add("a", data[:9], TrainConfig(batch_size=3, max_steps=4, eval_every=2), valid=data[9:])
    return outcome(trainer)


def diverging(group: Group) -> Outcome:
    """One job's loss becomes NaN, for whichever process has its sequence; the other job goes on."""
    base = base_of(model(torch.float64))
    bank = Bank(base.model)
    trainer = Trainer(base, bank, group=group)
    for name in ("good", "bad"):
        bank.add(name, LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
        trainer.add(name, examples(8, 1), TrainConfig(batch_size=4, max_steps=3))
    with torch.no_grad():
        next(bank["bad"].parameters()).fill_(torch.nan)
    results = outcome(trainer)
    end = trainer.jobs["bad"].progress.end
    assert end is not None
    assert end.reason == "diverged"
    return {key: tensor for key, tensor in results.items() if key.startswith("good")}


def refusal(group: Group) -> str:
    """What the processes say if they do not train the same."""
    try:
        group.check_same(lambda: {"the base": f"base {group.rank}", "passes": 3})
    except TrainingError as error:
        return str(error)
    return ""


SCENARIOS: dict[str, Callable[[Group], Outcome]] = {
    "float64": lambda group: language(group, torch.float64),
    "float32": lambda group: language(group, torch.float32),
    "checkpointing": lambda group: language(group, torch.float64, gradient_checkpointing=True),
    "sharded": lambda group: language(group, torch.float64, shard=group.size > 1),
    "classifier": classifier,
    "diverging": diverging,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with process_group() as group:
        for name, scenario in SCENARIOS.items():
            torch.save(scenario(group), folder / f"{name} {group.rank}.pt")
        (folder / f"refusal {group.rank}").write_text(refusal(group))
