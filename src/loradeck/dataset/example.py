"""What the model reads and what of it is learned, token by token. Knows tokenizers; knows no files.

What ends an answer is learned with it: the template's end of turn, or the tokenizer's end of text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Self

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.message import Message
from loradeck.dataset.record import UNSUPERVISED, Completion, Conversation, Pair, Record, Span, Text, Tokens
from loradeck.dataset.template import end_of_turn, sequences
from loradeck.errors import DataError

# One object for all occurrences of a token: 17 bytes a token, measured, in place of 29. No larger than a vocabulary.
ONE: dict[int, int] = {}


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence. `labels[t]` is `tokens[t]` where it is learned, UNSUPERVISED elsewhere."""

    tokens: list[int]
    labels: list[int]
    truncated: bool = False

    @classmethod
    def of(cls, record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Self:
        """Turn a record that makes one sequence into tokens and labels, cut at `max_length` tokens.

        Raises:
            DataError: it makes several, or cannot be learned: see `examples`.
        """
        made = _sequences(record, tokenizer, max_length)
        if len(made) > 1:
            raise DataError(f"$: makes {len(made)} sequences with this base and max_length, where there can be one")
        return cls._cut(*made[0], max_length)

    @classmethod
    def _cut(cls, tokens: list[int], labels: list[int], max_length: int) -> Self:
        example = cls(tokens[:max_length], labels[:max_length], truncated=len(tokens) > max_length)
        if not example.supervised:
            raise DataError(f"$: nothing to learn is left within max_length, {max_length} tokens; raise it")
        return example

    @property
    def supervised(self) -> int:
        """Tokens that are learned; the first is read, never predicted."""
        return sum(label != UNSUPERVISED for label in self.labels[1:])

    def segments(self, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """Return the text in runs that are learned, or not."""
        pairs = zip(self.tokens, self.labels, strict=True)
        return [
            (str(tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)), learned)
            for learned, run in groupby(pairs, key=lambda pair: pair[1] != UNSUPERVISED)
        ]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt; both sequences begin with its tokens, and only the answers are learned."""

    chosen: Example
    rejected: Example

    @classmethod
    def of(cls, pair: Pair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Self:
        """Turn a pair into two examples, each cut at `max_length` tokens.

        Raises:
            DataError: as Example.of.
        """
        return cls(*(Example.of(side, tokenizer, max_length) for side in (pair.chosen, pair.rejected)))

    @property
    def supervised(self) -> int:
        """Tokens of both that are learned."""
        return self.chosen.supervised + self.rejected.supervised

    @property
    def truncated(self) -> bool:
        """Whether either was cut."""
        return self.chosen.truncated or self.rejected.truncated


def examples(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example] | list[Preference]:
    """Turn a record into what is trained on.

    One example, unless a text is longer than `max_length`, which makes pieces of that size of which no token is lost,
    or the chat template asks for several sequences (see `template.sequences`).

    Raises:
        DataError: the chat template does not fit the record, or nothing to learn is left after the cut.
    """
    if isinstance(record, Pair):
        return [Preference.of(record, tokenizer, max_length)]
    return [Example._cut(*made, max_length) for made in _sequences(record, tokenizer, max_length)]


def ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens of which an adapter must learn one in order to stop: the end of text, and that of a turn."""
    try:
        mark = end_of_turn(tokenizer)
    except DataError:  # a template that fails here may take other turns; each record tells
        mark = ""
    turn = tokenizer(mark, add_special_tokens=False)["input_ids"]
    return frozenset(turn[-1:]) | ({tokenizer.eos_token_id} - {None})


def _sequences(
    record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and labels of each sequence; what is beyond `max_length` may be missing but for one token."""
    chat = tokenizer.chat_template is not None
    if isinstance(record, Completion) and chat:
        record = Conversation([Message("user", record.prompt), Message("assistant", record.completion)])
    match record:
        case Conversation() if not chat:
            raise DataError("$: the base's tokenizer has no chat template, so it takes no turns but prompt, completion")
        case Conversation():
            return [_tokenize(tokenizer, segments, max_length) for segments in sequences(tokenizer, record)]
        case Completion():
            return [_plain(tokenizer, [(record.prompt, False), (record.completion, True)])]
        case Text():
            return _pieces(*_plain(tokenizer, [("", False), (record.text, True)]), max_length)
        case Tokens():
            most = len(tokenizer)
            if beyond := next((token for token in record.tokens if token >= most), None):
                raise DataError(f"$: has token {beyond}; the base's tokenizer has {most}, from 0")
            return [(record.tokens, record.labels)]
        case Pair():
            raise DataError("$: is a preference pair, and makes two sequences")


def _pieces(tokens: list[int], labels: list[int], max_length: int) -> list[tuple[list[int], list[int]]]:
    """Cut a sequence into pieces, each but the first beginning with the token before it, to be read and not learned."""
    cuts = range(max_length - 1, len(tokens) - 1, max_length - 1)
    rest = [(tokens[at : at + max_length], [UNSUPERVISED, *labels[at + 1 : at + max_length]]) for at in cuts]
    return [(tokens[:max_length], labels[:max_length]), *rest]


def _plain(tokenizer: PreTrainedTokenizerBase, segments: list[Span]) -> tuple[list[int], list[int]]:
    """Tokenize a text as it stands, begun and ended as the tokenizer begins and ends texts."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("$: the base's tokenizer has no end of text, so the adapter could not learn to stop")
    tokens, labels = _tokenize(tokenizer, segments, special=True)
    return [*tokens, end], [*labels, end]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    segments: Iterable[Span],
    max_length: int | None = None,
    *,
    special: bool = False,
) -> tuple[list[int], list[int]]:
    """Tokenize segment after segment, stopping once past `max_length` tokens.

    `special` lets the tokenizer begin the text as it does every text; a chat template has done so itself.
    A segment's tokens are those it has in the whole text, for some tokenizers mark a text's first word; unless a merge
    would cross its border: at inference the prompt is tokenized without the answer.
    """
    text = ""
    tokens: list[int] = []
    labels: list[int] = []
    for segment, learned in segments:
        text += segment
        joint = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]  # or it warns of long texts
        if joint[: len(tokens)] == tokens:
            fresh = joint[len(tokens) :]
        else:
            fresh = tokenizer(segment, add_special_tokens=False)["input_ids"]
        fresh = [ONE.setdefault(token, token) for token in fresh]
        tokens += fresh
        labels += fresh if learned else [UNSUPERVISED] * len(fresh)
        if max_length is not None and len(tokens) > max_length:
            break
    return tokens, labels
