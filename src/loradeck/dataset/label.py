"""Labels: the records that have them, under their usual names, and the numbers that a dataset's labels get."""

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from loradeck.dataset.columns import naming
from loradeck.dataset.message import Json
from loradeck.dataset.record import GENERATE, REWARD, Forms, LabelledText, Record, TaggedWords, require_text
from loradeck.errors import ConfigError, DataError, shorten

NOT_TAGGED = -100  # a tag that files give to what is not to be learned
FEW = 20  # labels; more of them are refused if every second example has one of its own
SHOWN = 12  # labels named in an error
INTEGER = re.compile(r"-?[0-9]{1,18}")

# Usual names, the most usual first; two names are those of a pair.
TEXTS = (
    ("text", "text_pair"),
    ("text",),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "document"),
    ("sentence",),
    ("content",),
    ("review",),
    ("comment",),
    ("document",),
    ("question",),
)
LABEL = ("label", "labels", "category", "class", "target", "sentiment", "intent", "topic")
WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags", "tag")


class _RawLabelledText(msgspec.Struct, frozen=True):
    text: str
    label: Any
    text_pair: str | None = None

    def to_record(self) -> Record:
        pair = {} if self.text_pair is None else {"text_pair": self.text_pair}
        require_text(text=self.text, **pair)
        return LabelledText((self.text, *pair.values()), _name(self.label, "$.label"))


class _RawTaggedWords(msgspec.Struct, frozen=True):
    tokens: list[str]
    tags: list[Any]

    def to_record(self) -> Record:
        if len(self.tokens) != len(self.tags):
            raise DataError(f"$.tags: has {len(self.tags)} items, but tokens has {len(self.tokens)}")
        require_text(**{f"tokens[{index}]": word for index, word in enumerate(self.tokens)})
        tags = [
            None if tag in (None, NOT_TAGGED) else _name(tag, f"$.tags[{index}]") for index, tag in enumerate(self.tags)
        ]
        if all(tag is None for tag in tags):
            raise DataError("$.tags: nothing to learn; there is no tag")
        return TaggedWords(self.tokens, tags)


def _name(label: object, path: str) -> str:
    """Return a label's name; that of a number is its digits.

    Raises:
        DataError: it is neither a text nor an integer.
    """
    if isinstance(label, float) and label.is_integer():  # a table with empty cells has its integers as floats
        label = int(label)
    if isinstance(label, str) and label.strip():
        return label.strip()
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int):
        return f"{label}"
    if isinstance(label, float):
        raise DataError(
            f"{path}: is the number {label:g}; a label is a text or an integer, regression is not supported"
        )
    if isinstance(label, list):
        raise DataError(f"{path}: is a list; several labels of one text are not supported")
    raise DataError(f"{path}: is empty" if isinstance(label, str) else f"{path}: must be a text or an integer")


def _usual_text(keys: Json) -> dict[str, str]:
    present = _present(keys)
    label = next((name for name in LABEL if name in present), "label")
    texts = next((names for names in TEXTS if present.issuperset(names)), ())
    return _others({**dict(zip(("text", "text_pair"), texts, strict=False)), "label": label}, present)


def _usual_words(keys: Json) -> dict[str, str]:
    present = _present(keys)
    names = {"tokens": WORDS, "tags": TAGS}
    return _others(
        {ours: next((name for name in usual if name in present), ours) for ours, usual in names.items()}, present
    )


def _present(keys: Json) -> set[str]:
    return {key for key, value in keys.items() if value is not None}


def _others(columns: Mapping[str, str], present: Collection[str]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in columns.items() if theirs in present and ours != theirs}


FORMS: Mapping[str, Forms] = MappingProxyType(
    {
        "generate": GENERATE,
        "classify": Forms(
            ((_RawLabelledText, {"text", "label"}),), "text and label", _usual_text, needed=("text", "label")
        ),
        "tokens": Forms(((_RawTaggedWords, {"tokens", "tags"}),), "tokens and tags", _usual_words, ("tokens", "tags")),
        "reward": REWARD,
    }
)
"""What a record can be, for each task that a dataset is read for."""


def forms_of(task: str) -> Forms:
    """Return the forms of a task's records.

    Raises:
        ConfigError: no dataset is read for the task.
    """
    if task not in FORMS:
        raise ConfigError(f"there is nothing to learn for task {task!r:.40}", hint=f"Use {', '.join(FORMS)}.")
    return FORMS[task]


def fitting_task(keys: Json) -> str | None:
    """Return the first task for which a record has one of the forms; None if there is none."""
    for task in ("classify", "tokens", "generate"):  # a text with a label is also a text
        forms = FORMS[task]
        present = _present(keys) | forms.usual(keys).keys()
        if any(present.issuperset(required) for _, required in forms.table):
            return task
    return None


class Labels:
    """The names of a dataset's labels, sorted once they are closed, and a number for each, by its first appearance."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """Take the names, if they are known; else those of the training split, until `close`."""
        self.names = [*names]
        self.closed = bool(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def number(self, name: str, path: str) -> int:
        """Return a label's number, which stays the same when the labels are closed; `path` is for errors.

        Raises:
            DataError: it is not one of those that are known.
        """
        if name not in self._numbers:
            if self.closed:
                shown = ", ".join(map(shorten, self.names[:SHOWN])) + ", …" * (len(self.names) > SHOWN)
                raise DataError(f"{path}: {shorten(name)} is not one of the labels that training has: {shown}")
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]

    def close(self) -> list[int]:
        """Sort the names and accept no others; return for each number the place of its label in `names`."""
        if not self.closed:
            self.names.sort(key=int if all(map(INTEGER.fullmatch, self.names)) else None)
        self.closed = True
        return [self.names.index(name) for name in self._numbers]

    def problem(self, examples: int, key: str) -> DataError | None:
        """Return what is wrong with the labels of so many examples, of a key: only one, or nearly as many as those."""
        if len(self.names) == 1:
            return DataError(f"train: every {key} is {shorten(self.names[0])}, so there is nothing to learn")
        if len(self.names) > max(FEW, examples // 2):
            what = f"train: {key} has {len(self.names):,} different values in {examples:,} examples; are these labels?"
            return naming(DataError(what), {key: "COLUMN"})
        return None
