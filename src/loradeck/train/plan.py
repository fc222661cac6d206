"""The plan of a job: its sizes, its settings with a reason for each, and its first example."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields

from torch import nn

from loradeck.dataset.record import Span
from loradeck.dataset.token_file import Sizes
from loradeck.lora.bank import RESIDENTS
from loradeck.lora.config import LoraConfig
from loradeck.lora.targets import stacked_weights
from loradeck.train.config import TrainConfig
from loradeck.train.run import Run
from loradeck.train.schedule import Schedule

# Reasons for the defaults. Sources: LoRA Without Regret (Thinking Machines, 2025), PEFT, Tinker.
REASONS = {
    "target_modules": "adapters on attention alone are worse at any rank",
    "r": "more capacity than a small dataset needs",
    "lora_alpha": "fixed, so that the best learning rate barely depends on r",
    "lora_dropout": "rarely needed for a few epochs",
    "batch_size": "LoRA loses quality with large batches",
    "epochs": "more rarely help; use a validation split to keep the best",
    "schedule": "steady decay to zero",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a job, and its first example with the part that is trained on."""

    name: str
    trainable: int
    """Parameters of the adapter."""
    adapter_bytes: int
    base_bytes: int
    form: str
    """The form of the dataset's records."""
    examples: int
    valid: int
    """Validation examples."""
    truncated: int
    """Examples cut to max_length."""
    tokens: int
    """Tokens of one epoch."""
    supervised: int
    """Those of them that are trained on."""
    longest: int
    """Tokens of the longest example."""
    batch_size: int
    schedule: Schedule
    settings: dict[str, tuple[str, str]]
    """Settings, each with its value and the reason for it."""
    first: list[Span]
    """The first example's text in spans that are trained on, or not."""
    left_out: str = ""
    """What all-linear cannot adapt, with its share of the base."""
    notes: tuple[str, ...] = ()
    """What of the dataset is passed over, left out, or read otherwise than written."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """How often the dataset's training split has each label of a classifier."""

    @property
    def ratio(self) -> float:
        """The adapter's bytes per byte of the base."""
        return self.adapter_bytes / self.base_bytes


def plan(run: Run, name: str) -> Plan:
    """Return the plan of one of a run's jobs."""
    job, split, bank = run.trainer.jobs[name], run.data[name], run.bank
    sizes = Sizes.of(split.train)
    lora = next(each.lora for each in run.recipe.jobs if each.name == name)
    return Plan(
        name=name,
        trainable=sum(parameter.numel() for parameter in bank.parameters(name)),
        adapter_bytes=bank[name].nbytes,
        base_bytes=base_bytes(run.base.model),
        left_out=left_out(run.base.model, lora),
        form=split.dataset.form,
        notes=split.dataset.notes,
        labels=split.dataset.label_counts.get("train", {}),
        examples=len(split.train),
        valid=len(split.valid),
        truncated=sizes.truncated,
        tokens=sizes.tokens,
        supervised=sizes.supervised,
        longest=sizes.longest,
        batch_size=job.config.batch_size,
        schedule=job.schedule,
        settings={name: (str(value), reason) for name, (value, reason) in settings_of(lora, job.config).items()},
        first=split.train[0].sequences[0].spans(run.base.tokenizer),
    )


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters without those of the adapters on it."""
    return sum(each.nbytes for path, each in model.named_parameters() if RESIDENTS not in path.split("."))


def left_out(model: nn.Module, lora: LoraConfig) -> str:
    """Return what all-linear cannot adapt, with its share of the base; "" for nothing, and for other targets."""
    stacks = stacked_weights(model) if lora.target_modules == "all-linear" else {}
    if not stacks:
        return ""
    share = sum(parameter.nbytes for parameter in stacks.values()) / base_bytes(model)
    names = sorted({re.sub(r"\.\d+\.", ".*.", path) for path in stacks})
    return f"{share:.0%} of the base: {', '.join(names)}, which are bare parameters and take no adapter"


def settings_of(lora: LoraConfig, config: TrainConfig) -> dict[str, tuple[object, str]]:
    """Return the settings that were changed, and the defaults that have a reason: each value with its reason."""
    values = {f.name: (getattr(each, f.name), f.default) for each in (lora, config) for f in fields(each)}
    if config.max_steps is not None:  # instead of epochs
        del values["epochs"]
    return {
        name: (value, "as given" if value != default else REASONS[name])
        for name, (value, default) in values.items()
        if name in REASONS or (value != default and default is not MISSING)
    }
