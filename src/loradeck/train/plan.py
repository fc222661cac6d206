"""What a training run would be, before any of it is done: what `--dry-run` shows. Computes nothing on the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from loradeck.base.load import Base
from loradeck.lora.bank import Bank
from loradeck.train.config import TrainConfig
from loradeck.train.example import UNSUPERVISED, Example, Segment
from loradeck.train.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a run, and its first example with what of it is learned."""

    trainable: int
    """Parameters of the adapter."""
    adapter_bytes: int
    base_bytes: int
    examples: int
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
    first: list[Segment]
    """The first example's text in runs that are learned, or not."""

    @property
    def ratio(self) -> float:
        """The adapter's bytes per byte of the base."""
        return self.adapter_bytes / self.base_bytes


def plan(base: Base, bank: Bank, name: str, examples: Sequence[Example], config: TrainConfig) -> Plan:
    """Say what `train` with the same arguments would do."""
    residents = sum(bank[resident].nbytes for resident in bank.names())  # they count among the model's parameters
    return Plan(
        trainable=sum(parameter.numel() for parameter in bank.parameters(name)),
        adapter_bytes=bank[name].nbytes,
        base_bytes=sum(parameter.nbytes for parameter in base.model.parameters()) - residents,
        examples=len(examples),
        truncated=sum(example.truncated for example in examples),
        tokens=sum(len(example.tokens) for example in examples),
        supervised=sum(example.supervised for example in examples),
        longest=max(len(example.tokens) for example in examples),
        batch_size=config.batch_size,
        schedule=Schedule.of(config, len(examples), base.model.config),
        first=_segments(base, examples[0]),
    )


def _segments(base: Base, example: Example) -> list[Segment]:
    pairs = zip(example.tokens, example.labels, strict=True)
    return [
        (str(base.tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)), learned)
        for learned, run in groupby(pairs, key=lambda pair: pair[1] != UNSUPERVISED)
    ]
