"""Check a dataset before training: sizes, what is trained on, duplicates, and problems.

Valid records are measured whatever is wrong with the others.
"""

import hashlib
from collections.abc import Callable, Sequence
from itertools import takewhile
from math import ceil
from pathlib import Path
from typing import Self

import msgspec
from transformers import PreTrainedTokenizerBase

from loradeck.dataset.config import DataConfig
from loradeck.dataset.example import Example
from loradeck.dataset.finding import Finding
from loradeck.dataset.reader import DatasetReader, ParsedRow
from loradeck.dataset.record import LabelledText, PreferencePair, Record, Span, TaggedWords, TokenIds
from loradeck.dataset.source import Position, find


class Duplicate(msgspec.Struct, frozen=True, rename={"location": "place"}):
    """A record and an earlier one that it equals, both as `file:line`."""

    location: str
    of: str


class Lengths(msgspec.Struct, frozen=True):
    """The lengths of a split's sequences; each number is the length of one of them."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        """Summarise one or more lengths."""
        ordered = sorted(lengths)
        return cls(*(ordered[max(0, ceil(share * len(ordered)) - 1)] for share in (0, 0.5, 0.95, 1)))


class SplitReport(msgspec.Struct, rename={"supervised": "learned"}):
    """One split of a dataset."""

    records: int = 0
    examples: int = 0
    """A record makes one, but a long text makes several, and so does a conversation with some chat templates."""
    lengths: Lengths | None = None
    """In the report's unit; None without a valid record."""
    total: int = 0
    """Sum of the lengths."""
    supervised: int = 0
    """The part of `total` that is trained on."""
    truncated: int = 0
    """Examples truncated to max_length."""
    skipped: int = 0
    """Records left out because they are longer than max_length."""
    duplicates: list[Duplicate] = []
    """Records that this split holds twice."""
    leaked: list[Duplicate] = []
    """Records that are also in the training split."""
    prompts: list[Duplicate] = []
    """Records whose prompt is also in the training split, with another answer."""
    labels: dict[str, int] = {}
    """How often each label occurs, for a classifier."""


class Report(msgspec.Struct, rename={"unused": "passed_over"}):
    """What `check_dataset` returns; as JSON it is the output of `loradeck check --json`."""

    name: str
    form: str = "none"
    """As in Dataset."""
    unit: str = "tokens"
    """Of lengths: tokens, or characters without a tokenizer."""
    splits: dict[str, SplitReport] = {}
    first: list[list[Span]] = []
    """The first example in spans; for a preference pair, the chosen one and the rejected one."""
    unused: list[Finding] = []
    """The keys that are passed over."""
    remarks: list[Finding] = []
    """What is left out, read otherwise than written, or held twice."""
    problems: list[Finding] = []
    """Everything that training would refuse."""


def check_dataset(
    source: Path | str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    config: DataConfig | None = None,
    *,
    task: str = "generate",
    on_read: Callable[[Position], None] | None = None,
) -> Report:
    """Read a dataset as training would, past its invalid records. Without a tokenizer, count characters.

    `task` is the base's. `on_read` is called after each record, and each piece of a file.

    Raises:
        DataError: it cannot be found.
        ConfigError: max_length is below 2, or there are no records for such a task.
    """
    config = config or DataConfig()
    files = find(source, config.encoding, on_read)
    reader = DatasetReader(files, tokenizer, max_length, config, task)
    report = Report(str(source), splits={split: SplitReport() for split in files.rows})
    seen: dict[str, dict[bytes, str]] = {split: {} for split in files.rows}
    train_prompts: dict[bytes, str] = {}
    lengths: dict[str, list[int]] = {split: [] for split in files.rows}
    for row in reader.rows():
        split, sizes = report.splits[row.split], _sizes(row)
        lengths[row.split] += [total for total, _ in sizes]
        split.records += 1
        split.examples += len(row.examples) or 1
        split.total += sum(total for total, _ in sizes)
        split.supervised += sum(supervised for _, supervised in sizes)
        split.truncated += sum(example.truncated for example in row.examples)
        report.first = report.first or _first(row, tokenizer)
        spans = row.record.spans()
        whole, prompt = _digest(spans), _digest(list(takewhile(lambda span: not span.trained, spans)))
        if of := seen[row.split].get(whole):
            split.duplicates.append(Duplicate(row.location, of))
        seen[row.split].setdefault(whole, row.location)
        if row.split == "train":
            train_prompts.setdefault(prompt, row.location)
        elif of := seen["train"].get(whole):
            split.leaked.append(Duplicate(row.location, of))
        elif (of := train_prompts.get(prompt)) and not spans[0].trained:
            split.prompts.append(Duplicate(row.location, of))
        if on_read:
            on_read(files.position)
    for name, sizes in lengths.items():
        report.splits[name].lengths = Lengths.of(sizes) if sizes else None
    forms = [*reader.learns_to_stop]
    report.unit = "tokens" if tokenizer or forms == ["tokens"] else "characters"
    report.form = ", ".join(forms) or "none"
    for split_name, count in reader.skipped.items():
        report.splits[split_name].skipped = count
    for split_name, counts in reader.counts.items():
        report.splits[split_name].labels = {name: counts[name] for name in reader.labels.names if counts[name]}
    report.unused, report.remarks = reader.unused.list(), reader.remarks.list()
    report.problems = reader.problems.list()
    return report


def _sizes(row: ParsedRow) -> list[tuple[int, int]]:
    """Return the length of each sequence, and how much of it is trained on."""
    if row.examples:
        return [(len(each.tokens), each.supervised) for example in row.examples for each in example.sequences]
    if isinstance(row.record, TokenIds):
        example = Example(row.record.tokens, row.record.labels)
        return [(len(example.tokens), example.supervised)]
    return [
        (sum(len(span.text) for span in side), sum(len(span.text) for span in side if span.trained))
        for side in _sides(row.record)
    ]


def _first(row: ParsedRow, tokenizer: PreTrainedTokenizerBase | None) -> list[list[Span]]:
    if tokenizer is None or isinstance(row.record, LabelledText | TaggedWords):
        return _sides(row.record)
    return [each.spans(tokenizer) for example in row.examples[:1] for each in example.sequences]


def _sides(record: Record) -> list[list[Span]]:
    sides = (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record,)
    return [side.spans() for side in sides]


def _digest(spans: Sequence[Span]) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(spans), digest_size=16).digest()
