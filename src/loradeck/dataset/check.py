"""What a dataset is, before it is trained on: its size, what of it is learned, what is there twice, what is wrong.

Knows records and examples; prints nothing. Good records are measured whatever is wrong with the others.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import ceil
from pathlib import Path
from typing import Self

import msgspec
from transformers import PreTrainedTokenizerBase

from loradeck.dataset.example import Example, Preference
from loradeck.dataset.read import DatasetReader, Entry
from loradeck.dataset.record import Pair, Record, Span, Tokens
from loradeck.dataset.source import find


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A record, and an earlier one that it equals; both as `file:line`."""

    place: str
    of: str


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of a split's sequences; each number is the length of one of them."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        """Measure at least one length."""
        ordered = sorted(lengths)
        return cls(*(ordered[max(0, ceil(share * len(ordered)) - 1)] for share in (0, 0.5, 0.95, 1)))


@dataclass(slots=True)
class Part:
    """One split of a dataset."""

    records: int = 0
    examples: int = 0
    """What the records make: a long text makes several, and a conversation with some templates. A pair is one."""
    lengths: Lengths | None = None
    """In the report's unit; None where no record is good."""
    total: int = 0
    learned: int = 0
    """Of the total."""
    truncated: int = 0
    """Examples cut to max_length."""
    duplicates: list[Duplicate] = field(default_factory=list)
    """Records that are twice in this split."""
    leaked: list[Duplicate] = field(default_factory=list)
    """Records that are also in the training split."""
    prompts: list[Duplicate] = field(default_factory=list)
    """Records whose prompt is also in the training split, with another answer."""


@dataclass(slots=True)
class Report:
    """What `check` found."""

    name: str
    form: str = "none"
    """As in Dataset."""
    unit: str = "tokens"
    """Of lengths: tokens, or characters without a tokenizer."""
    splits: dict[str, Part] = field(default_factory=dict)
    first: list[list[Span]] = field(default_factory=list)
    """The first example in runs that are learned, or not; for a pair the chosen one and the rejected one."""
    problems: list[str] = field(default_factory=list)
    """All that a training would refuse, each `file:line: path: what`."""


def check_dataset(source: Path | str, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> Report:
    """Read a dataset as training would, and go on after what is bad. Without a tokenizer, characters are counted.

    Raises:
        DataError: it cannot be found.
        ConfigError: max_length is below 2.
    """
    found = find(source)
    reading = DatasetReader(found, tokenizer, max_length)
    report = Report(str(source))
    report.splits = {split: Part() for split in found.rows}
    seen: dict[str, dict[bytes, str]] = {split: {} for split in found.rows}
    asked: dict[bytes, str] = {}  # prompts of the training split
    lengths: dict[str, list[int]] = {split: [] for split in found.rows}
    for entry in reading.entries():
        part, sizes = report.splits[entry.split], _sizes(entry)
        lengths[entry.split] += [total for total, _ in sizes]
        part.records += 1
        part.examples += len(entry.examples) or 1
        part.total += sum(total for total, _ in sizes)
        part.learned += sum(learned for _, learned in sizes)
        part.truncated += sum(example.truncated for example in entry.examples)
        report.first = report.first or _first(entry, tokenizer)
        segments = entry.record.segments()
        whole, prompt = _digest(segments), _digest(list(takewhile(lambda segment: not segment[1], segments)))
        if of := seen[entry.split].get(whole):
            part.duplicates.append(Duplicate(entry.place, of))
        seen[entry.split].setdefault(whole, entry.place)
        if entry.split == "train":
            asked.setdefault(prompt, entry.place)
        elif of := seen["train"].get(whole):
            part.leaked.append(Duplicate(entry.place, of))
        elif (of := asked.get(prompt)) and not segments[0][1]:
            part.prompts.append(Duplicate(entry.place, of))
    for split, sizes in lengths.items():
        report.splits[split].lengths = Lengths.of(sizes) if sizes else None
    report.unit = "tokens" if tokenizer or [*reading.stops] == ["tokens"] else "characters"
    report.form, report.problems = ", ".join(reading.stops) or "none", reading.problems
    return report


def _sizes(entry: Entry) -> list[tuple[int, int]]:
    """Return the length of each sequence, and how much of it is learned."""
    if entry.examples:
        return [(len(example.tokens), example.supervised) for example in _sequences(entry.examples)]
    if isinstance(entry.record, Tokens):
        example = Example(entry.record.tokens, entry.record.labels)
        return [(len(example.tokens), example.supervised)]
    return [
        (sum(len(text) for text, _ in side), sum(len(text) for text, learned in side if learned))
        for side in _sides(entry.record)
    ]


def _first(entry: Entry, tokenizer: PreTrainedTokenizerBase | None) -> list[list[Span]]:
    if tokenizer is None:
        return _sides(entry.record)
    return [example.segments(tokenizer) for example in _sequences(entry.examples[:1])]


def _sequences(examples: Sequence[Example | Preference]) -> list[Example]:
    pairs = ((each.chosen, each.rejected) if isinstance(each, Preference) else (each,) for each in examples)
    return [example for pair in pairs for example in pair]


def _sides(record: Record) -> list[list[Span]]:
    return [side.segments() for side in ((record.chosen, record.rejected) if isinstance(record, Pair) else (record,))]


def _digest(segments: Sequence[Span]) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(segments), digest_size=16).digest()
