"""Check a dataset before training: sizes, what is trained on, duplicates, and problems.

Valid records are measured whatever is wrong with the others.
"""

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, takewhile
from math import ceil
from pathlib import Path
from typing import Self

import msgspec
from transformers import PreTrainedTokenizerBase

from loradeck.dataset.config import DataConfig
from loradeck.dataset.example import Example
from loradeck.dataset.finding import FIRST, Finding, Findings
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
    def of(cls, lengths: Iterable[int] | Counter[int]) -> Self:
        """Summarise one or more lengths, or how often each occurs."""
        counts = Counter(lengths)
        ordered = sorted(counts)
        ends = [*accumulate(counts[length] for length in ordered)]  # of each length in the list of all
        ranks = (max(1, ceil(share * ends[-1])) for share in (0, 0.5, 0.95, 1))
        return cls(*(ordered[bisect_left(ends, rank)] for rank in ranks))


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
    places: int = FIRST,
    compared: int | None = None,
    on_read: Callable[[Position], None] | None = None,
    on_row: Callable[[ParsedRow], None] | None = None,
) -> Report:
    """Read a dataset as training would, past its invalid records. Without a tokenizer, count characters.

    Args:
        source: A file, a folder with splits, or a dataset of the hub.
        tokenizer: The base's.
        max_length: Maximum tokens of a sequence; longer ones are cut at the end.
        config: How its records are read.
        task: The base's.
        places: How many places of a problem are told.
        compared: How many records are compared with others, which takes memory for each of them; None for all. The rest
            count as if they had no duplicates, and a remark says so.
        on_read: Called after each record, and each piece of a file.
        on_row: Called with each valid record.

    Raises:
        DataError: it cannot be found.
        ConfigError: max_length is below 2, or there are no records for such a task.
    """
    config = config or DataConfig()
    files = find(source, config.encoding, on_read)
    reader = DatasetReader(files, tokenizer, max_length, config, task, problems=Findings(places=places))
    report = Report(str(source), splits={split: SplitReport() for split in files.rows})
    seen: dict[str, dict[bytes, str]] = {split: {} for split in files.rows}
    train_prompts: dict[bytes, str] = {}
    lengths: dict[str, Counter[int]] = {split: Counter() for split in files.rows}
    count = 0
    for row in reader.rows():
        split, sizes = report.splits[row.split], _sizes(row)
        lengths[row.split].update(total for total, _ in sizes)
        split.records += 1
        split.examples += len(row.examples) or 1
        split.total += sum(total for total, _ in sizes)
        split.supervised += sum(supervised for _, supervised in sizes)
        split.truncated += sum(example.truncated for example in row.examples)
        report.first = report.first or spans_of(row, tokenizer)
        if on_row:
            on_row(row)
        if on_read:
            on_read(files.position)
        count += 1
        if compared is not None and count > compared:
            continue
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
    if compared is not None and count > compared:
        report.remarks.append(Finding(f"duplicates are counted among the first {compared:,} of {count:,} records"))
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


def spans_of(row: ParsedRow, tokenizer: PreTrainedTokenizerBase | None) -> list[list[Span]]:
    """Return the first example of a record in spans; of a preference pair, the chosen one and the rejected one."""
    if tokenizer is None or isinstance(row.record, LabelledText | TaggedWords):
        return _sides(row.record)
    return [each.spans(tokenizer) for example in row.examples[:1] for each in example.sequences]


def _sides(record: Record) -> list[list[Span]]:
    sides = (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record,)
    return [side.spans() for side in sides]


def _digest(spans: Sequence[Span]) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(spans), digest_size=16).digest()
