"""Read a whole dataset by split, or refuse it with every problem it has."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.example import Example, Preference
from loradeck.dataset.reader import DatasetReader
from loradeck.dataset.record import EXPECTED
from loradeck.dataset.source import SPLITS, Position, find
from loradeck.dataset.token_file import StoredExamples, TokenFile
from loradeck.errors import DataError

HINT = f"Each record has {EXPECTED}."
Examples: TypeAlias = StoredExamples[Example] | StoredExamples[Preference]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The examples of a dataset, by split. They are on disk and read when they are asked for."""

    name: str
    """The path or hub id that was given."""
    form: str
    """How its records are written: messages, prompt and completion, alpaca, sharegpt, text, tokens, preference pairs;
    several are separated by commas."""
    train: Examples
    valid: Examples
    """Empty if there is no such split."""
    test: Examples
    sha256: str
    """Of the bytes of its files; of its rows if they come from the hub."""

    @property
    def preferences(self) -> bool:
        """Whether it holds preference pairs, for DPO."""
        return isinstance(self.train[0], Preference)


def read_dataset(
    source: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    encoding: str | None = None,
    on_read: Callable[[Position], None] | None = None,
) -> Dataset:
    """Read a file, a folder with splits, or a dataset of the hub; blank lines are ignored.

    `on_read` is called after each record.

    Raises:
        DataError: it cannot be read, a split is empty, the disk is full, or records are invalid: each is a problem,
            `file:line: path: what`.
        ConfigError: max_length is below 2.
    """
    files = find(source, encoding)
    reader = DatasetReader(files, tokenizer, max_length)
    file = TokenFile()
    ends = dict.fromkeys(SPLITS, 0)
    for row in reader.rows():
        for example in row.examples:
            file.append(example)
        ends[row.split] = len(file)
        if on_read:
            on_read(files.position)
    if reader.problems:
        count = len(reader.problems)
        raise DataError(
            f"{source} has {count} problem{'s' * (count > 1)} and cannot be trained on", reader.problems, hint=HINT
        )
    splits: dict[str, Examples] = {}
    start = 0
    for split in SPLITS:
        stop = max(start, ends[split])
        splits[split] = file.examples(range(start, stop))
        start = stop
    return Dataset(str(source), ", ".join(reader.learns_to_stop), **splits, sha256=files.sha256)
