"""Tokens and labels: what the model reads, and which of it is trained on.

The end of an answer is trained on too: the template's end of turn, or the tokenizer's end of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.encode import Encoded, Encoder
from loradeck.dataset.record import UNSUPERVISED, PreferencePair, Record, Span
from loradeck.dataset.template import marks
from loradeck.errors import DataError

LONG = {
    "hint": "Or leave out the long records:",
    "python": "DataConfig(skip_long=True)",
    "cli": "--skip-long, or in a run file skip_long = true",
    "http": '"lora": {"skip_long": true}',
}


class TooLongError(DataError):
    """A record of whose answer nothing is left within max_length."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train on. `labels[t]` is `tokens[t]` where it is trained on, UNSUPERVISED elsewhere.

    Those of a LabelledExample one, for a classifier, are other numbers: see there.
    """

    tokens: list[int]
    labels: list[int]
    truncated: bool = False

    @classmethod
    def of(cls, record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Self:
        """Tokenize a record that makes one sequence, truncated to `max_length` tokens.

        Raises:
            DataError: it makes several sequences, or cannot be trained on: see `examples`.
        """
        return cls._only(Encoder(tokenizer, max_length).encode(record), max_length)

    @classmethod
    def _only(cls, encoded: Sequence[Encoded], max_length: int) -> Self:
        if len(encoded) > 1:
            raise DataError(f"$: makes {len(encoded)} sequences with this base and max_length; expected one")
        return cls._truncated(*encoded[0], max_length)

    @classmethod
    def _truncated(cls, tokens: list[int], labels: list[int], max_length: int) -> Self:
        example = cls(tokens[:max_length], labels[:max_length], truncated=len(tokens) > max_length)
        if not example.supervised:
            raise TooLongError(f"$: nothing to train on within max_length, {max_length} tokens; raise it", **LONG)
        return example

    @property
    def sequences(self) -> tuple["Example", ...]:
        """Itself; of a preference pair, the chosen and the rejected sequence."""
        return (self,)

    @property
    def supervised(self) -> int:
        """Number of tokens trained on; the first token is never predicted, so it does not count."""
        return sum(label != UNSUPERVISED for label in self.labels[1:])

    def spans(self, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """Return the text in spans that are trained on, or not."""
        pairs = zip(self.tokens, self.labels, strict=True)
        return [
            Span(str(tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)), trained)
            for trained, run in groupby(pairs, key=lambda pair: pair[1] != UNSUPERVISED)
        ]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt. Both sequences begin with the prompt's tokens; only the answers are trained on."""

    chosen: Example
    rejected: Example

    @classmethod
    def of(cls, pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Self:
        """Tokenize a pair, each side truncated to `max_length` tokens.

        Raises:
            DataError: as Example.of.
        """
        return cls(*(Example.of(side, tokenizer, max_length) for side in (pair.chosen, pair.rejected)))

    @property
    def sequences(self) -> tuple[Example, Example]:
        """The chosen and the rejected sequence."""
        return self.chosen, self.rejected

    @property
    def supervised(self) -> int:
        """Number of tokens trained on, in both."""
        return self.chosen.supervised + self.rejected.supervised

    @property
    def truncated(self) -> bool:
        """Whether either was truncated."""
        return self.chosen.truncated or self.rejected.truncated


def examples(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    fold_system: bool = False,
    remarks: set[str] | None = None,
) -> list[Example] | list[Preference]:
    """Tokenize a record into its examples.

    There is one example, with two exceptions: a text longer than `max_length` is split into chunks of that size, and
    a chat template may need several sequences (see `template.sequences`). `fold_system` and `remarks` are as in
    Encoder.

    Raises:
        DataError: the chat template does not fit the record.
        TooLongError: truncation leaves nothing to train on.
    """
    encoder = Encoder(tokenizer, max_length, fold_system, set() if remarks is None else remarks)
    if isinstance(record, PreferencePair):
        return [
            Preference(*(Example._only(encoder.encode(each), max_length) for each in (record.chosen, record.rejected)))
        ]
    return [Example._truncated(*encoded, max_length) for encoded in encoder.encode(record)]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the end-of-text and end-of-turn tokens; an adapter must be trained on one of them to learn to stop."""
    turn = tokenizer(marks(tokenizer).end, add_special_tokens=False)["input_ids"]
    return frozenset(turn[-1:]) | ({tokenizer.eos_token_id} - {None})
