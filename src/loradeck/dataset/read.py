"""One dataset, by split, read whole or refused whole. Knows problems and their places; knows no files and no JSON."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.example import Example, Preference, ends, examples
from loradeck.dataset.record import EXPECTED, PAIRS, Record, parse
from loradeck.dataset.source import SPLITS, Row, Source, Split, find
from loradeck.errors import ConfigError, DataError

MEND = f"Each record has {EXPECTED}."
Learnables: TypeAlias = list[Example] | list[Preference]
AsGiven = TypeVar("AsGiven", bound=Learnables)


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is trained on, and what is only measured."""

    name: str
    """As it was asked for."""
    form: str
    """How its records are written: messages, prompt and completion, alpaca, sharegpt, text, tokens, preference pairs;
    several with commas between them."""
    train: Learnables
    valid: Learnables
    """Empty where there is no such split."""
    test: Learnables
    sha256: str
    """Of the bytes of its files; of its rows where they are the hub's."""

    @property
    def preferences(self) -> bool:
        """Whether it is pairs, for DPO."""
        return isinstance(self.train[0], Preference)


@dataclass(frozen=True, slots=True)
class Entry:
    """A good record of a dataset."""

    split: Split
    place: str
    record: Record
    examples: Learnables
    """None of them where there is no tokenizer."""


@dataclass(slots=True)
class DatasetReader:
    """A dataset as it is read: good records come out, problems stay here."""

    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    problems: list[str] = field(default_factory=list)
    stops: dict[str, bool] = field(default_factory=dict)
    """By form, in the order they were met: whether a training example of it learns to stop."""
    marks: frozenset[int] = frozenset()
    """The tokens at which the model stops."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; the first token is only read", hint="Give 2 or more.")
        if self.tokenizer is not None:
            self.marks = ends(self.tokenizer)

    def entries(self) -> Iterator[Entry]:
        """Yield the good records, split after split; once they are through, `problems` are all there are."""
        for split, rows in self.source.rows.items():
            row = None
            try:
                for row in rows:
                    try:
                        yield self._entry(split, row)
                    except DataError as error:
                        self.problems.append(f"{row.place}: {error.message}")
                if row is None:
                    self.problems.append(f"{split}: is empty")
            except DataError as error:  # of the file itself
                self.problems.append(error.message)
        if self.tokenizer is not None:
            marks = self.tokenizer.convert_ids_to_tokens(sorted(self.marks))
            self.problems += [
                f"train: no example of {form} learns to stop; let some end, within {self.max_length} tokens, with "
                f"{' or '.join(marks) or 'an end of text, which this tokenizer lacks'}, and learn it"
                for form, stops in self.stops.items()
                if not stops
            ]

    def _entry(self, split: Split, row: Row) -> Entry:
        if isinstance(row.content, DataError):
            raise row.content
        record = parse(row.content)
        if self.stops and (record.form == PAIRS) != (PAIRS in self.stops):
            raise DataError(f"$: is of {record.form}, those before it of {', '.join(self.stops)}; make two datasets")
        made: Learnables = [] if self.tokenizer is None else examples(record, self.tokenizer, self.max_length)
        stops = self.stops.get(record.form, split != "train")
        self.stops[record.form] = stops or any(map(self._learns_to_stop, made))
        return Entry(split, row.place, record, made)

    def _learns_to_stop(self, example: Example | Preference) -> bool:
        answer = example.chosen if isinstance(example, Preference) else example
        return not self.marks.isdisjoint(answer.labels)


def read_dataset(source: Path | str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Read a file, a folder with splits, or a dataset of the hub; blank lines are passed over.

    Raises:
        DataError: it cannot be read, a split is empty, or records are bad: each is a problem, `file:line: path: what`.
        ConfigError: max_length is below 2.
    """
    found = find(source)
    reading = DatasetReader(found, tokenizer, max_length)
    splits: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for entry in reading.entries():
        splits[entry.split] += entry.examples
    if reading.problems:
        count = len(reading.problems)
        raise DataError(
            f"{source} has {count} problem{'s' * (count > 1)} and cannot be trained on", reading.problems, hint=MEND
        )
    return Dataset(str(source), ", ".join(reading.stops), **splits, sha256=found.sha256)


def held_out(examples: AsGiven, ratio: float, seed: int) -> tuple[AsGiven, AsGiven]:
    """Split examples into those to train on and about `ratio` of them to measure on, at least one each, both in order.

    Equal examples stay together, so none is on both sides. The same examples and seed give the same split.

    Raises:
        ConfigError: the ratio is not between 0 and 1.
        DataError: there are no two examples that differ.
    """
    if not 0 < ratio < 1:
        raise ConfigError(f"a ratio of {ratio!r:.40} cannot be held out", hint="Give a number between 0 and 1.")
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for at, example in enumerate(examples):
        groups.setdefault(_identity(example), []).append(at)
    if len(groups) < 2:
        raise DataError("there are no two different examples, so none can be held out", hint="Give more examples.")
    most = min(max(1, round(ratio * len(examples))), len(examples) - 1)
    alike = sorted(groups.values())
    random.Random(f"held out {seed}").shuffle(alike)  # a string seeds alike in every process
    chosen: set[int] = set()
    for group in alike:
        if len(chosen) + len(group) <= most:
            chosen.update(group)
    chosen = chosen or set(min(alike, key=len))
    train = [example for at, example in enumerate(examples) if at not in chosen]
    valid = [example for at, example in enumerate(examples) if at in chosen]
    return cast("AsGiven", train), cast("AsGiven", valid)


def _identity(example: Example | Preference) -> tuple[tuple[int, ...], ...]:
    parts = (example.chosen, example.rejected) if isinstance(example, Preference) else (example,)
    return tuple(tuple(ids) for part in parts for ids in (part.tokens, part.labels))
