"""What a job would be, before any of it is done: what `--dry-run` shows. Computes nothing on the model."""

from dataclasses import MISSING, dataclass, fields

from loradeck.dataset.record import Span
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.run import Run
from loradeck.train.schedule import Schedule

# Why a setting that was left out is what it is. Sources: LoRA Without Regret (Thinking Machines, 2025), PEFT, Tinker.
REASONS = {
    "target_modules": "adapters on attention alone fall behind, at any rank",
    "r": "room for more than a small dataset holds",
    "lora_alpha": "fixed, so that the best learning rate hardly depends on r",
    "lora_dropout": "a few passes over the data seldom need it",
    "batch_size": "LoRA loses quality in large batches",
    "epochs": "more seldom helps; keep the best by a validation split",
    "schedule": "a steady way down to zero",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a job, and its first example with what of it is learned."""

    name: str
    trainable: int
    """Parameters of the adapter."""
    adapter_bytes: int
    base_bytes: int
    form: str
    """How the dataset was recognised."""
    examples: int
    valid: int
    """Examples to validate on."""
    truncated: int
    """Examples that were cut to max_length."""
    tokens: int
    """In one pass over the examples."""
    supervised: int
    """Of these tokens, the ones that are learned."""
    longest: int
    """Tokens of the longest example."""
    batch_size: int
    schedule: Schedule
    settings: dict[str, tuple[str, str]]
    """Settings with their values and the reasons for them."""
    first: list[Span]
    """The first example's text in runs that are learned, or not."""

    @property
    def ratio(self) -> float:
        """The adapter's bytes per byte of the base."""
        return self.adapter_bytes / self.base_bytes


def plan(run: Run, name: str) -> Plan:
    """Say what a run will do for one of its jobs."""
    job, split, bank = run.trainer.jobs[name], run.data[name], run.bank
    residents = sum(bank[resident].nbytes for resident in bank.names())  # they count among the model's parameters
    documents = [document for example in split.train for document in job.objective.unit(example)]
    return Plan(
        name=name,
        trainable=sum(parameter.numel() for parameter in bank.parameters(name)),
        adapter_bytes=bank[name].nbytes,
        base_bytes=sum(parameter.nbytes for parameter in run.base.model.parameters()) - residents,
        form=split.dataset.form,
        examples=len(split.train),
        valid=len(split.valid),
        truncated=sum(example.truncated for example in split.train),
        tokens=sum(len(document.tokens) for document in documents),
        supervised=sum(document.supervised for document in documents),
        longest=max(len(document.tokens) for document in documents),
        batch_size=job.config.batch_size,
        schedule=job.schedule,
        settings=_settings(next(own.lora for own in run.recipe.jobs if own.name == name), job.config),
        first=documents[0].spans(run.base.tokenizer),
    )


def _settings(lora: LoraConfig, config: TrainConfig) -> dict[str, tuple[str, str]]:
    """Return what was set, and what was left to its default for a reason."""
    values = {f.name: (getattr(own, f.name), f.default) for own in (lora, config) for f in fields(own)}
    return {
        name: (str(value), "as given" if value != default else REASONS[name])
        for name, (value, default) in values.items()
        if name in REASONS or (value != default and default is not MISSING)
    }
