"""Sequences with labels: what a classifier reads, and the numbers of the labels that it learns."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from transformers import BatchEncoding, PreTrainedTokenizerBase

from loradeck.dataset.example import LONG, Example, Preference, TooLongError, examples
from loradeck.dataset.record import UNSUPERVISED, Completion, LabelledText, PreferencePair, Span, TaggedWords
from loradeck.errors import DataError


@dataclass(frozen=True, slots=True)
class LabelledExample(Example):
    """A sequence in which `labels` holds numbers of labels: that of a text at its last token, of a word at its first.

    Other tokens are UNSUPERVISED. Tokens from `second` on are of the second segment (token type 1), if there is one.
    """

    second: int = 0
    """0 if there is only one segment."""

    @property
    def supervised(self) -> int:
        """Number of labels."""
        return sum(label != UNSUPERVISED for label in self.labels)

    def spans(self, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
        """Return the text as one span: no token of it is learned."""
        return [Span(str(tokenizer.decode(self.tokens, clean_up_tokenization_spaces=False)), trained=False)]

    @classmethod
    def of_text(cls, texts: Sequence[str], label: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Self:
        """Encode a text, or a pair of texts, as the tokenizer does, cut to `max_length` tokens."""
        encoding, truncated = _encode(texts, tokenizer, max_length)
        return cls._of(encoding, {len(encoding["input_ids"]) - 1: label}, truncated=truncated)

    @classmethod
    def of_words(
        cls, words: Sequence[str], labels: Sequence[int | None], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Self:
        """Encode words with spaces between them, as the text of a request is, cut to `max_length` tokens.

        Raises:
            DataError: the tokenizer does not say where its tokens are in a text.
            TooLongError: no token with a label is left.
        """
        if not tokenizer.is_fast:
            raise DataError("$: the base's tokenizer does not say which tokens are of which word")
        encoding, truncated = _encode([" ".join(words)], tokenizer, max_length, return_offsets_mapping=True)
        spans = encoding["offset_mapping"]
        # Special tokens have empty spans. The first token of a word may begin with the space before it.
        tokens = [(end, token) for token, (start, end) in enumerate(spans) if end > start]
        ends = [end for end, _ in tokens]
        places: dict[int, int] = {}
        start = 0
        for word, label in zip(words, labels, strict=True):
            at = bisect_right(ends, start)
            if label is not None and at < len(tokens):
                places[tokens[at][1]] = label
            start += len(word) + 1
        if not places:
            raise TooLongError(f"$: no tag within max_length, {max_length} tokens; raise it", **LONG)
        return cls._of(encoding, places, truncated=truncated)

    @classmethod
    def _of(cls, encoding: BatchEncoding, places: Mapping[int, int], *, truncated: bool) -> Self:
        tokens = encoding["input_ids"]
        types = encoding.get("token_type_ids") or ()
        labels = [places.get(at, UNSUPERVISED) for at in range(len(tokens))]
        return cls(tokens, labels, truncated, second=types.index(1) if 1 in types else 0)


def encode_labelled(
    record: LabelledText | TaggedWords,
    numbers: Sequence[int | None],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> LabelledExample:
    """Encode a record with the numbers of its labels.

    Raises:
        DataError: see LabelledExample.
    """
    if isinstance(record, TaggedWords):
        return LabelledExample.of_words(record.words, numbers, tokenizer, max_length)
    (label,) = numbers
    assert label is not None
    return LabelledExample.of_text(record.texts, label, tokenizer, max_length)


def encode_pair(
    pair: PreferencePair,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    fold_system: bool = False,
    remarks: set[str] | None = None,
) -> Preference:
    """Encode a preference pair for a reward model: as for DPO, or as pairs of texts if there is no end of text.

    Raises:
        DataError: as `examples`.
    """
    sides = pair.chosen, pair.rejected
    if tokenizer.chat_template is None and tokenizer.eos_token is None:
        texts = [(side.prompt, side.completion) for side in sides if isinstance(side, Completion)]
        if len(texts) == 2:
            return Preference(*(LabelledExample.of_text(each, 0, tokenizer, max_length) for each in texts))
    (preference,) = examples(pair, tokenizer, max_length, fold_system=fold_system, remarks=remarks)
    assert isinstance(preference, Preference)
    return preference


def _encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, **settings: bool
) -> tuple[BatchEncoding, bool]:
    """Return the encoding of a text or a pair, cut to `max_length` tokens, and whether it was longer."""
    encoding = tokenizer(*texts, verbose=False, **settings)
    truncated = len(encoding["input_ids"]) > max_length
    if truncated:
        encoding = tokenizer(*texts, truncation=True, max_length=max_length, **settings)
    if not encoding["input_ids"]:
        raise DataError("$: has no tokens")
    return encoding, truncated
