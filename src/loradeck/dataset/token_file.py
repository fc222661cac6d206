"""Examples on disk, so that a dataset needs the same memory whatever its size.

One file holds the tokens of one sequence after the other as int32; a token that is not trained on is stored as its
complement, ~token, which is negative. A sequence with labels is its tokens, its labels, and where its second segment
begins. Another file holds an ENTRY for each sequence. Both are temporary files without a name: they vanish with the
last reference, or with the process.
"""

import hashlib
import os
import tempfile
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, Generic, Self, TypeAlias, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from loradeck.dataset.example import UNSUPERVISED, Example, Preference
from loradeck.dataset.labelled_example import LabelledExample
from loradeck.errors import DataError

ENTRY = np.dtype(
    [
        ("offset", "<u8"),  # in numbers of the other file
        ("hash", "<u8"),  # of the example; both sequences of a preference pair have the same
        ("length", "<u4"),
        ("supervised", "<u4"),
        ("truncated", "u1"),
    ]
)
ENTRIES = 1 << 16  # read at a time
BUFFER = 1 << 20
HINT = "Set TMPDIR to a folder with more space; the tokens need about as much as the text."

E = TypeVar("E", Example, Preference)
Rows: TypeAlias = "range | array[int]"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of examples, in tokens."""

    tokens: int
    supervised: int
    longest: int
    """The longest sequence."""
    truncated: int
    """Examples that were truncated."""

    @classmethod
    def of(cls, examples: Sequence[Example] | Sequence[Preference]) -> "Sizes":
        """Measure one or more examples."""
        if isinstance(examples, StoredExamples):
            return examples.sizes
        documents = [document for example in examples for document in example.sequences]
        return cls(
            tokens=sum(len(document.tokens) for document in documents),
            supervised=sum(document.supervised for document in documents),
            longest=max(len(document.tokens) for document in documents),
            truncated=sum(example.truncated for example in examples),
        )


class TokenFile:
    """Where the examples of a dataset are written, and read again; all are of one kind.

    They are in TMPDIR, else in /var/tmp if that can be written to, because /tmp may be in memory.
    """

    def __init__(self) -> None:
        self._tokens, self._entries = _temporary_file(self), _temporary_file(self)
        self._position = 0
        self._count = 0
        self._sides = 1
        """Sequences of an example."""
        self._labelled = False
        self.label_numbers: Sequence[int] = ()
        """What a label that was written is read as, if the labels are numbered anew."""

    def __len__(self) -> int:
        return self._count

    def append(self, example: Example | Preference) -> None:
        """Write an example.

        Raises:
            DataError: the disk is full.
        """
        sides = example.sequences
        self._sides, self._labelled = len(sides), isinstance(sides[0], LabelledExample)
        encoded = [_encode(side) for side in sides]
        hash_ = hashlib.blake2b(digest_size=8)
        for tokens in encoded:
            hash_.update(len(tokens).to_bytes(8, "little") + tokens.tobytes())
        number = int.from_bytes(hash_.digest(), "little")
        try:
            for side, tokens in zip(sides, encoded, strict=True):
                entry = (self._position, number, len(side.tokens), side.supervised, side.truncated)
                self._entries.write(np.array(entry, ENTRY).tobytes())
                self._tokens.write(tokens.tobytes())
                self._position += len(tokens)
        except OSError as error:
            raise _full(error) from error
        self._count += 1

    def examples(self, rows: Rows) -> "StoredExamples[Any]":
        """Return some of the examples written so far.

        Raises:
            DataError: the disk is full.
        """
        try:
            self._tokens.flush()
            self._entries.flush()
        except OSError as error:
            raise _full(error) from error
        return StoredExamples(self, rows)

    def read(self, row: int) -> Example | Preference:
        """Read one example."""
        sides = [self._sequence(entry) for entry in self.entries(row, row + 1)[0]]
        return sides[0] if self._sides == 1 else Preference(*sides)

    def _sequence(self, entry: np.void) -> Example:
        size, length, truncated = np.dtype(np.int32).itemsize, int(entry["length"]), bool(entry["truncated"])
        count = 2 * length + 1 if self._labelled else length
        content = os.pread(self._tokens.fileno(), count * size, int(entry["offset"]) * size)
        stored = np.frombuffer(content, np.int32)
        if self._labelled:
            labels: list[int] = stored[length:-1].tolist()
            if self.label_numbers:
                labels = [label if label == UNSUPERVISED else self.label_numbers[label] for label in labels]
            return LabelledExample(stored[:length].tolist(), labels, truncated, second=int(stored[-1]))
        supervised = stored >= 0
        return Example(
            np.where(supervised, stored, ~stored).tolist(),
            np.where(supervised, stored, UNSUPERVISED).tolist(),
            truncated,
        )

    def entries(self, start: int, stop: int) -> NDArray[np.void]:
        """Return the entries of some examples in a row: (examples, sequences of each)."""
        size = ENTRY.itemsize * self._sides
        content = os.pread(self._entries.fileno(), (stop - start) * size, start * size)
        return np.frombuffer(content, ENTRY).reshape(-1, self._sides)


class StoredExamples(Sequence[E], Generic[E]):
    """Examples in a token file, or some of them, in order; each is read when it is asked for."""

    def __init__(self, file: TokenFile, rows: Rows) -> None:
        self._file, self._rows = file, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> E | Self:
        if isinstance(index, slice):
            return type(self)(self._file, self._rows[index])
        return cast("E", self._file.read(self._rows[index]))

    def at(self, indices: "array[int]") -> Self:
        """Return the examples at some indices, which ascend."""
        return type(self)(self._file, array("I", (self._rows[index] for index in indices)))

    def entries(self) -> Iterator[NDArray[np.void]]:
        """Yield the entries of all, some at a time: (examples, sequences of each)."""
        for start in range(0, len(self._file), ENTRIES):
            stop = min(start + ENTRIES, len(self._file))
            chosen = self._rows[bisect_left(self._rows, start) : bisect_left(self._rows, stop)]
            if chosen:
                yield self._file.entries(start, stop)[np.asarray(chosen) - start]

    @cached_property
    def sizes(self) -> Sizes:
        """Their sizes; without reading their tokens."""
        tokens = supervised = longest = truncated = 0
        for entries in self.entries():
            tokens += int(entries["length"].sum(dtype=np.int64))
            supervised += int(entries["supervised"].sum(dtype=np.int64))
            longest = max(longest, int(entries["length"].max()))
            truncated += int(entries["truncated"].any(axis=1).sum())
        return Sizes(tokens, supervised, longest, truncated)


def _temporary_file(owner: object) -> BinaryIO:
    """Return a file without a name, which is closed with its owner."""
    named = any(os.environ.get(variable) for variable in ("TMPDIR", "TEMP", "TMP"))
    folder = None if named or not os.access("/var/tmp", os.W_OK) else "/var/tmp"
    try:
        file = cast("BinaryIO", tempfile.TemporaryFile(dir=folder, buffering=BUFFER, prefix="loradeck-"))  # noqa: SIM115
    except OSError as error:
        raise _full(error) from error
    weakref.finalize(owner, _close, file)
    return file


def _close(file: BinaryIO) -> None:
    with suppress(OSError):  # of writing the rest, on a full disk
        file.close()


def _full(error: OSError) -> DataError:
    return DataError(f"the tokens cannot be written to a temporary file: {error.strerror}", hint=HINT)


def _encode(example: Example) -> NDArray[np.int32]:
    if isinstance(example, LabelledExample):
        return np.array([*example.tokens, *example.labels, example.second], np.int32)
    tokens = np.array(example.tokens, np.int32)
    return np.where(np.array(example.labels) == UNSUPERVISED, ~tokens, tokens)
