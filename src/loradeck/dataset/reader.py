"""Read a dataset's rows into records and examples, past those that are invalid."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
from transformers import PreTrainedTokenizerBase

from loradeck.dataset.config import DataConfig
from loradeck.dataset.control import control_tokens, likely_tokens
from loradeck.dataset.example import Example, Preference, TooLongError, examples, stop_tokens
from loradeck.dataset.finding import Finding, Findings
from loradeck.dataset.label import Labels, fitting_task, forms_of
from loradeck.dataset.labelled_example import encode_labelled, encode_pair
from loradeck.dataset.record import PAIRS, LabelledText, PlainText, PreferencePair, Record, TaggedWords, parse
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
    """Yields a dataset's valid records, and collects the problems of the others and what else is to be said."""

    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    config: DataConfig = field(default_factory=DataConfig)
    task: str = "generate"
    """What the records are for, as in Base.load."""
    labels: Labels = field(default_factory=Labels)
    """For a classifier: complete once the training split is read."""
    label_numbers: list[int] = field(default_factory=list)
    """The number of each label, by that of the examples that `rows` yields."""
    counts: dict[Split, Counter[str]] = field(default_factory=dict)
    """How often each split has each label."""
    problems: Findings = field(default_factory=Findings)
    unused: Findings = field(default_factory=lambda: Findings(by_cause=False))
    """The keys that are passed over."""
    remarks: Findings = field(default_factory=Findings)
    """What is left out, read otherwise than written, or held twice."""
    skipped: Counter[Split] = field(default_factory=Counter)
    """The number of records that are left out as too long."""
    learns_to_stop: dict[str, bool] = field(default_factory=dict)
    """By form, in order of appearance: whether a training example of it is trained on a stop token."""
    stop_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(
                f"max_length must be at least 2, not {self.max_length}", hint="The first token is never predicted."
            )
        forms_of(self.task)
        if self.tokenizer is not None and self.task == "generate":
            self.stop_tokens = stop_tokens(self.tokenizer)

    def rows(self) -> Iterator[ParsedRow]:
        """Yield the valid records, split after split; `problems` is complete once they are exhausted."""
        for split, rows in self.source.rows.items():
            row = None
            valid = 0
            try:
                for row in rows:
                    try:
                        if parsed := self._parsed(split, row):
                            valid += 1
                            yield parsed
                    except DataError as error:
                        self.problems.add(Finding.of(error), row.location)
                if row is None:
                    self.problems.add(Finding(f"{split}: is empty"))
                elif not valid and self.skipped[split]:
                    self.problems.add(Finding(f"{split}: nothing is left within {self.max_length} tokens; raise it"))
                if split == "train" and self.counts:
                    self._close_labels()
            except DataError as error:  # about the file as a whole
                self.problems.add(Finding.of(error))
        if self.tokenizer is not None and self.task == "generate":
            marks = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_tokens))
            for form in (form for form, learns in self.learns_to_stop.items() if not learns):
                what = (
                    f"train: no example of {form} learns to stop; some must end, within {self.max_length} tokens, with "
                    f"{' or '.join(marks) or 'an end of text, which this tokenizer lacks'}, and train on it"
                )
                self.problems.add(Finding(what))

    def notes(self) -> tuple[str, ...]:
        """Return what is to be said of a dataset without problems, in lines."""
        keys = ", ".join(f"{each.what} (in {each.records:,})" for each in self.unused.list())
        return (*([f"passed over: {keys}"] if keys else []), *map(str, self.remarks.list()))

    def _parsed(self, split: Split, row: Row) -> ParsedRow | None:
        """Return a row's record and examples; None if it is left out as too long."""
        if isinstance(row.content, DataError):
            raise row.content
        record, forms = self._record(row.content), self.learns_to_stop
        if forms and (record.form == PAIRS) != (PAIRS in forms):
            raise DataError(f"$: {record.form} cannot be mixed with {', '.join(forms)}; make two datasets")
        for key in record.unused:
            self.unused.add(Finding(key if key.strip() and key.isprintable() else repr(key)), row.location)
        tokenized, remarks = self._tokenized(split, record)
        for remark in sorted(remarks):
            self.remarks.add(Finding(remark), row.location)
        if tokenized is None:
            self.skipped[split] += 1
            return None
        forms[record.form] = forms.get(record.form, split != "train") or any(map(self._stops, tokenized))
        return ParsedRow(split, row.location, record, tokenized)

    def _record(self, content: bytes) -> Record:
        """Return a row's record.

        Raises:
            DataError: it has none of the forms. If it has one of another task, the hint says so.
        """
        try:
            return parse(content, self.config.source_columns, forms_of(self.task))
        except DataError as error:
            if "unknown form" not in error.message:
                raise
            task = fitting_task(msgspec.json.decode(content.decode("utf-8-sig")))
            if task is None:
                raise
            cli = f"Give --task {task}." if task != "generate" else "Leave out --task."
            hint = {"hint": "These records are for another task.", "python": f'Give task="{task}".', "cli": cli}
            raise DataError(error.message, **hint) from error

    def _close_labels(self) -> None:
        """Number the labels, of which training has no more, and say what is wrong with new ones."""
        key = "label" if self.task == "classify" else "tags"
        if not self.labels.closed and (problem := self.labels.problem(self.counts["train"].total(), key)):
            self.problems.add(Finding.of(problem))
        self.label_numbers = self.labels.close()

    def _numbers(self, split: Split, record: LabelledText | TaggedWords) -> list[int | None]:
        """Return the numbers of a record's labels."""
        names = [record.label] if isinstance(record, LabelledText) else record.tags
        path = "$.label" if isinstance(record, LabelledText) else "$.tags"
        numbers = [None if name is None else self.labels.number(name, path) for name in names]
        self.counts.setdefault(split, Counter()).update(name for name in names if name is not None)
        return numbers

    def _tokenized(self, split: Split, record: Record) -> tuple[Examples | None, set[str]]:
        """Return a record's examples, None if it is to be left out, and the remarks on it."""
        numbers = self._numbers(split, record) if isinstance(record, LabelledText | TaggedWords) else []
        tokens = likely_tokens(record)
        remarks: set[str] = set()
        if isinstance(record, PlainText) and not {"label", "labels"}.isdisjoint(record.unused):
            remarks.add("has a label, which a language model does not learn; the task classify does")
        if self.tokenizer is None:
            return [], remarks | {f"holds {token}, which looks like a control token" for token in tokens}
        others = [token for token in tokens if token not in control_tokens(self.tokenizer)]
        remarks |= {f"holds {token}, which looks like another base's control token" for token in others}
        fold, skip = self.config.fold_system, self.config.skip_long
        tokenizer, length = self.tokenizer, self.max_length
        try:
            if isinstance(record, LabelledText | TaggedWords):
                tokenized: Examples | None = [encode_labelled(record, numbers, tokenizer, length)]
            elif isinstance(record, PreferencePair) and self.task == "reward":
                tokenized = [encode_pair(record, tokenizer, length, fold_system=fold, remarks=remarks)]
            else:
                tokenized = examples(record, tokenizer, length, fold_system=fold, remarks=remarks)
        except TooLongError:
            if not skip:
                raise
            tokenized = None
        if skip and (tokenized is None or any(example.truncated for example in tokenized)):
            return None, {f"left out: longer than {self.max_length} tokens"}
        return tokenized, remarks

    def _stops(self, example: Example | Preference) -> bool:
        answer = example.chosen if isinstance(example, Preference) else example
        return not self.stop_tokens.isdisjoint(answer.labels)
