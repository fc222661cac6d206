"""Tokens and labels: what the model reads, and which of it is trained on.

The end of an answer is trained on too: the template's end of turn, or the tokenizer's end of text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Self

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.message import Message
from loradeck.dataset.record import (
    UNSUPERVISED,
    Completion,
    Conversation,
    PlainText,
    PreferencePair,
    Record,
    Span,
    TokenIds,
)
from loradeck.dataset.template import end_of_turn, sequences
from loradeck.errors import DataError

# One int object per token id: 17 bytes a token, measured, instead of 29. It grows no larger than the vocabulary.
INTERNED: dict[int, int] = {}


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to train on. `labels[t]` is `tokens[t]` where it is trained on, UNSUPERVISED elsewhere."""

    tokens: list[int]
    labels: list[int]
    truncated: bool = False

    @classmethod
    def of(cls, record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Self:
        """Tokenize a record that makes one sequence, truncated to `max_length` tokens.

        Raises:
            DataError: it makes several sequences, or cannot be trained on: see `examples`.
        """
        encoded = _encode(record, tokenizer, max_length)
        if len(encoded) > 1:
            raise DataError(f"$: makes {len(encoded)} sequences with this base and max_length; expected one")
        return cls._truncated(*encoded[0], max_length)

    @classmethod
    def _truncated(cls, tokens: list[int], labels: list[int], max_length: int) -> Self:
        example = cls(tokens[:max_length], labels[:max_length], truncated=len(tokens) > max_length)
        if not example.supervised:
            raise DataError(f"$: nothing to train on within max_length, {max_length} tokens; raise it")
        return example

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
    def supervised(self) -> int:
        """Number of tokens trained on, in both."""
        return self.chosen.supervised + self.rejected.supervised

    @property
    def truncated(self) -> bool:
        """Whether either was truncated."""
        return self.chosen.truncated or self.rejected.truncated


def examples(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example] | list[Preference]:
    """Tokenize a record into its examples.

    There is one example, with two exceptions: a text longer than `max_length` is split into chunks of that size, and
    a chat template may need several sequences (see `template.sequences`).

    Raises:
        DataError: the chat template does not fit the record, or truncation leaves nothing to train on.
    """
    if isinstance(record, PreferencePair):
        return [Preference.of(record, tokenizer, max_length)]
    return [Example._truncated(*encoded, max_length) for encoded in _encode(record, tokenizer, max_length)]


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the end-of-text and end-of-turn tokens; an adapter must be trained on one of them to learn to stop."""
    try:
        mark = end_of_turn(tokenizer)
    except DataError:  # a template that fails on the probe may accept other messages; each record reports its own
        mark = ""
    turn = tokenizer(mark, add_special_tokens=False)["input_ids"]
    return frozenset(turn[-1:]) | ({tokenizer.eos_token_id} - {None})


def _encode(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and labels of each sequence, possibly only the first `max_length` + 1 of them."""
    chat = tokenizer.chat_template is not None
    if isinstance(record, Completion) and chat:
        record = Conversation([Message("user", record.prompt), Message("assistant", record.completion)])
    match record:
        case Conversation() if not chat:
            raise DataError("$: the base has no chat template for conversations; give prompt and completion, or text")
        case Conversation():
            return [_tokenize(tokenizer, spans, max_length) for spans in sequences(tokenizer, record)]
        case Completion():
            return [_encode_plain(tokenizer, record.spans())]
        case PlainText():
            start = Span("", trained=False)  # so that the tokenizer's begin of text is context only
            return _chunks(*_encode_plain(tokenizer, [start, *record.spans()]), max_length)
        case TokenIds():
            size = len(tokenizer)
            if invalid := next((token for token in record.tokens if token >= size), None):
                raise DataError(f"$: token {invalid} is outside the base's vocabulary of {size}")
            return [(record.tokens, record.labels)]
        case PreferencePair():
            raise DataError("$: a preference pair makes two sequences")


def _chunks(tokens: list[int], labels: list[int], max_length: int) -> list[tuple[list[int], list[int]]]:
    """Split a sequence into chunks; each after the first begins with the token before it, as context only."""
    starts = range(max_length - 1, len(tokens) - 1, max_length - 1)
    rest = [(tokens[at : at + max_length], [UNSUPERVISED, *labels[at + 1 : at + max_length]]) for at in starts]
    return [(tokens[:max_length], labels[:max_length]), *rest]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, spans: list[Span]) -> tuple[list[int], list[int]]:
    """Tokenize a text without a template, between the tokenizer's own begin and end of text."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("$: the base's tokenizer has no end-of-text token, so the adapter could not learn to stop")
    tokens, labels = _tokenize(tokenizer, spans, special=True)
    return [*tokens, end], [*labels, end]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    spans: Iterable[Span],
    max_length: int | None = None,
    *,
    special: bool = False,
) -> tuple[list[int], list[int]]:
    """Tokenize span after span, stopping once there are more than `max_length` tokens.

    `special` lets the tokenizer add its special tokens; a chat template has already written them. A span gets the
    tokens it has within the whole text, because some tokenizers mark a text's first word. The exception is a merge
    across the span's start: at inference the prompt is tokenized without the answer.
    """
    text = ""
    tokens: list[int] = []
    labels: list[int] = []
    for span in spans:
        text += span.text
        joint = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]  # verbose warns of long texts
        if joint[: len(tokens)] == tokens:
            new = joint[len(tokens) :]
        else:
            new = tokenizer(span.text, add_special_tokens=False)["input_ids"]
        new = [INTERNED.setdefault(token, token) for token in new]
        tokens += new
        labels += new if span.trained else [UNSUPERVISED] * len(new)
        if max_length is not None and len(tokens) > max_length:
            break
    return tokens, labels
