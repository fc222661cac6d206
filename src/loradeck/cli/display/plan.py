"""The plan of a job, which `--dry-run` prints: its sizes, settings and first example."""

import re
from dataclasses import MISSING, dataclass, fields

from torch import nn

from loradeck.cli.display.text import columns
from loradeck.dataset.record import Span
from loradeck.dataset.token_file import Sizes
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

    @property
    def ratio(self) -> float:
        """The adapter's bytes per byte of the base."""
        return self.adapter_bytes / self.base_bytes


def plan(run: Run, name: str) -> Plan:
    """Return the plan of one of a run's jobs."""
    job, split, bank = run.trainer.jobs[name], run.data[name], run.bank
    adapter_bytes = sum(bank[adapter].nbytes for adapter in bank.names())  # part of the model's parameters
    sizes = Sizes.of(split.train)
    base_bytes = sum(parameter.nbytes for parameter in run.base.model.parameters()) - adapter_bytes
    lora = next(each.lora for each in run.recipe.jobs if each.name == name)
    return Plan(
        name=name,
        trainable=sum(parameter.numel() for parameter in bank.parameters(name)),
        adapter_bytes=bank[name].nbytes,
        base_bytes=base_bytes,
        left_out=_left_out(run.base.model, base_bytes) if lora.target_modules == "all-linear" else "",
        form=split.dataset.form,
        notes=split.dataset.notes,
        examples=len(split.train),
        valid=len(split.valid),
        truncated=sizes.truncated,
        tokens=sizes.tokens,
        supervised=sizes.supervised,
        longest=sizes.longest,
        batch_size=job.config.batch_size,
        schedule=job.schedule,
        settings=_settings(lora, job.config),
        first=split.train[0].sequences[0].spans(run.base.tokenizer),
    )


def trial_columns(run: Run) -> str:
    """Return what the trials of a sweep differ in, a line each."""
    rows = [("trial", "learning rate", "r", "parameters")]
    for recipe in run.recipe.jobs:
        parameters = sum(parameter.numel() for parameter in run.bank.parameters(recipe.name))
        rate = run.trainer.jobs[recipe.name].schedule.peak
        rows.append((recipe.name, f"{rate:.2g}", f"{recipe.lora.r}", f"{parameters:,}"))
    return columns(rows, right={1, 2, 3})


def _left_out(model: nn.Module, base_bytes: int) -> str:
    stacks = stacked_weights(model)
    if not stacks:
        return ""
    share = sum(parameter.nbytes for parameter in stacks.values()) / base_bytes
    names = sorted({re.sub(r"\.\d+\.", ".*.", path) for path in stacks})
    return f"{share:.0%} of the base: {', '.join(names)}, which are bare parameters and take no adapter"


def _settings(lora: LoraConfig, config: TrainConfig) -> dict[str, tuple[str, str]]:
    """Return the settings that were changed, and the defaults that have a reason."""
    values = {f.name: (getattr(each, f.name), f.default) for each in (lora, config) for f in fields(each)}
    if config.max_steps is not None:  # instead of epochs
        del values["epochs"]
    return {
        name: (str(value), "as given" if value != default else REASONS[name])
        for name, (value, default) in values.items()
        if name in REASONS or (value != default and default is not MISSING)
    }
