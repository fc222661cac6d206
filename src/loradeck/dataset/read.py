"""Read a whole dataset by split, or refuse it with every problem it has."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.config import DataConfig
from loradeck.dataset.example import Example, Preference
from loradeck.dataset.finding import error_of
from loradeck.dataset.reader import DatasetReader, Examples
from loradeck.dataset.record import EXPECTED
from loradeck.dataset.source import SPLITS, find
from loradeck.errors import ConfigError, DataError

HINT = f"Each record has {EXPECTED}."
ExamplesT = TypeVar("ExamplesT", bound=Examples)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The examples of a dataset, by split."""

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
    notes: tuple[str, ...] = ()
    """What is passed over, left out, or read otherwise than written."""

    @property
    def preferences(self) -> bool:
        """Whether it holds preference pairs, for DPO."""
        return isinstance(self.train[0], Preference)


def read_dataset(
    source: Path | str, tokenizer: PreTrainedTokenizerBase, max_length: int, config: DataConfig | None = None
) -> Dataset:
    """Read a file, a folder with splits, or a dataset of the hub; blank lines are ignored.

    Raises:
        DataError: it cannot be read, a split is empty, or records are invalid: each cause is a problem, with the
            number of records and the first of them, `file:line: path: what`.
        ConfigError: max_length is below 2.
    """
    files = find(source)
    reader = DatasetReader(files, tokenizer, max_length, config or DataConfig())
    splits: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for row in reader.rows():
        splits[row.split] += row.examples
    if problems := reader.problems.list():
        raise error_of(str(source), problems, HINT)
    form, notes = ", ".join(reader.learns_to_stop), reader.notes()
    return Dataset(str(source), form, **splits, sha256=files.sha256, notes=notes)


def held_out(examples: ExamplesT, ratio: float, seed: int) -> tuple[ExamplesT, ExamplesT]:
    """Split examples into training and validation examples, about `ratio` of them; at least one each, in order.

    Equal examples stay together, so none is on both sides. The same examples and seed give the same split.

    Raises:
        ConfigError: the ratio is not between 0 and 1.
        DataError: no two examples differ.
    """
    if not 0 < ratio < 1:
        raise ConfigError(f"the ratio to hold out must be between 0 and 1, not {ratio!r:.40}")
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_identity(example), []).append(index)
    if len(groups) < 2:
        raise DataError("all examples are equal, so none can be held out", hint="Give more examples.")
    limit = min(max(1, round(ratio * len(examples))), len(examples) - 1)
    shuffled = sorted(groups.values())
    random.Random(f"held out {seed}").shuffle(shuffled)  # a string seeds alike in every process
    held: set[int] = set()
    for group in shuffled:
        if len(held) + len(group) <= limit:
            held.update(group)
    held = held or set(min(shuffled, key=len))
    train = [example for index, example in enumerate(examples) if index not in held]
    valid = [example for index, example in enumerate(examples) if index in held]
    return cast("ExamplesT", train), cast("ExamplesT", valid)


def _identity(example: Example | Preference) -> tuple[tuple[int, ...], ...]:
    sides = (example.chosen, example.rejected) if isinstance(example, Preference) else (example,)
    return tuple(tuple(ids) for side in sides for ids in (side.tokens, side.labels))
