"""Read a whole dataset by split, or refuse it with every problem it has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.config import DataConfig
from loradeck.dataset.example import Example, Preference
from loradeck.dataset.finding import FIRST, Findings, error_of
from loradeck.dataset.label import Labels, forms_of
from loradeck.dataset.reader import DatasetReader
from loradeck.dataset.source import SPLITS, Position, Split, find
from loradeck.dataset.token_file import StoredExamples, TokenFile

SplitExamples: TypeAlias = StoredExamples[Example] | StoredExamples[Preference]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The examples of a dataset, by split. They are on disk and read when they are asked for."""

    name: str
    """The path or hub id that was given."""
    form: str
    """How its records are written: messages, prompt and completion, alpaca, sharegpt, text, tokens, preference pairs,
    text and label, tokens and tags; several are separated by commas."""
    train: SplitExamples
    valid: SplitExamples
    """Empty if there is no such split."""
    test: SplitExamples
    sha256: str
    """Of the bytes of its files; of its rows if they come from the hub."""
    notes: tuple[str, ...] = ()
    """What is passed over, left out, or read otherwise than written."""
    labels: tuple[str, ...] = ()
    """For a classifier: the names of the labels, by their numbers in the examples."""
    label_counts: Mapping[Split, Mapping[str, int]] = field(default_factory=dict)
    """How often each split has each label."""

    @property
    def preferences(self) -> bool:
        """Whether it holds preference pairs, for DPO."""
        return isinstance(self.train[0], Preference)


def read_dataset(
    source: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    config: DataConfig | None = None,
    *,
    task: str = "generate",
    labels: Sequence[str] = (),
    places: int = FIRST,
    on_read: Callable[[Position], None] | None = None,
) -> Dataset:
    """Read a file, a folder with splits, or a dataset of the hub; blank lines are ignored.

    `task` is the base's, and decides which forms the records have. The labels that a classifier learns are those of
    the training split, sorted, or `labels` if they are given; no other is accepted. `on_read` is called after each
    record, and each piece of a file; a DataError that it raises is a problem of the dataset. An error tells the first
    `places` of each cause.

    Raises:
        DataError: it cannot be read, a split is empty, the disk is full, or records are invalid: each cause is a
            problem, with the number of records and the first of them, `file:line: path: what`.
        ConfigError: max_length is below 2, or there are no records for such a task.
    """
    config = config or DataConfig()
    hint = f"Each record has {forms_of(task).expected}."
    files = find(source, config.encoding, on_read)
    reader = DatasetReader(files, tokenizer, max_length, config, task, Labels(labels), problems=Findings(places=places))
    file = TokenFile()
    ends = dict.fromkeys(SPLITS, 0)
    for row in reader.rows():
        for example in row.examples:
            file.append(example)
        ends[row.split] = len(file)
        if on_read:
            on_read(files.position)
    if problems := reader.problems.list():
        raise error_of(str(source), problems, hint)
    form, notes = ", ".join(reader.learns_to_stop), reader.notes()
    file.label_numbers = reader.label_numbers
    splits: dict[str, SplitExamples] = {}
    start = 0
    for split in SPLITS:
        stop = max(start, ends[split])
        splits[split] = file.examples(range(start, stop))
        start = stop
    return Dataset(
        str(source),
        form,
        **splits,
        sha256=files.sha256,
        notes=notes,
        labels=tuple(reader.labels.names) if reader.counts else (),
        label_counts=reader.counts,
    )
