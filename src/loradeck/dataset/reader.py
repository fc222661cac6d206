"""Read a dataset's rows into records and examples, past those that are invalid."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.config import DataConfig
from loradeck.dataset.example import Example, Preference, examples, stop_tokens
from loradeck.dataset.record import PAIRS, Record, parse
from loradeck.dataset.source import Row, Source, Split
from loradeck.errors import ConfigError, DataError

Examples: TypeAlias = list[Example] | list[Preference]


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A valid record of a dataset, where it is, and its examples."""

    split: Split
    location: str
    record: Record
    examples: Examples
    """Empty without a tokenizer."""


@dataclass(slots=True)
class DatasetReader:
    """Yields a dataset's valid records, and collects the problems of the others."""

    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    config: DataConfig = field(default_factory=DataConfig)
    problems: list[str] = field(default_factory=list)
    learns_to_stop: dict[str, bool] = field(default_factory=dict)
    """By form, in order of appearance: whether a training example of it is trained on a stop token."""
    stop_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(
                f"max_length must be at least 2, not {self.max_length}", hint="The first token is never predicted."
            )
        if self.tokenizer is not None:
            self.stop_tokens = stop_tokens(self.tokenizer)

    def rows(self) -> Iterator[ParsedRow]:
        """Yield the valid records, split after split; `problems` is complete once they are exhausted."""
        for split, rows in self.source.rows.items():
            row = None
            try:
                for row in rows:
                    try:
                        yield self._parsed(split, row)
                    except DataError as error:
                        self.problems.append(f"{row.location}: {error.message}")
                if row is None:
                    self.problems.append(f"{split}: is empty")
            except DataError as error:  # about the file as a whole
                self.problems.append(error.message)
        if self.tokenizer is not None:
            marks = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_tokens))
            self.problems += [
                f"train: no example of {form} learns to stop; some must end, within {self.max_length} tokens, with "
                f"{' or '.join(marks) or 'an end of text, which this tokenizer lacks'}, and train on it"
                for form, learns in self.learns_to_stop.items()
                if not learns
            ]

    def _parsed(self, split: Split, row: Row) -> ParsedRow:
        if isinstance(row.content, DataError):
            raise row.content
        record, forms = parse(row.content), self.learns_to_stop
        if forms and (record.form == PAIRS) != (PAIRS in forms):
            raise DataError(f"$: {record.form} cannot be mixed with {', '.join(forms)}; make two datasets")
        tokenized: Examples = [] if self.tokenizer is None else examples(record, self.tokenizer, self.max_length)
        forms[record.form] = forms.get(record.form, split != "train") or any(map(self._stops, tokenized))
        return ParsedRow(split, row.location, record, tokenized)

    def _stops(self, example: Example | Preference) -> bool:
        answer = example.chosen if isinstance(example, Preference) else example
        return not self.stop_tokens.isdisjoint(answer.labels)
