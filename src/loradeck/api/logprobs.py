"""Log-probabilities as clients read them: with the text and bytes of tokens, not their ids. Knows a tokenizer."""

import codecs
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loradeck.api.responses import CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loradeck.sampling import Token

LEAST = -9999.0  # as OpenAI says "never": JSON has no infinity
BYTE = re.compile("<0x([0-9A-F]{2})>")  # a byte, in vocabularies that spell unknown characters so
# The characters by which GPT-2's kind of vocabulary writes bytes: those that print stand for themselves (encoder.py).
PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTED]
LETTERS = {chr(byte): byte for byte in PRINTED} | {chr(256 + at): byte for at, byte in enumerate(OTHERS)}


class Logprobs:
    """The words of one tokenizer. Any thread may ask."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._before: list[int] = tokenizer.encode("a", add_special_tokens=False)

    def chat(self, token: "Token") -> TokenLogprob:
        """Return what chat tells of a token; bytes that are no characters are spelled, as in \\xf0\\x9f."""

        def told(number: int, logprob: float) -> TopLogprob:
            own = self._bytes(number)
            return TopLogprob(_spelled(own), max(logprob, LEAST), [*own])

        own = told(token.id, _number(token))
        return TokenLogprob(own.token, own.logprob, own.bytes, [told(*top) for top in token.top])

    def completion(self, tokens: "Sequence[Token]", places: Sequence[int]) -> CompletionLogprobs:
        """Return what completions tell of tokens, of which each begins at its place in the text.

        A token is always among the likeliest of its own place; of two with one name the likelier is.
        """
        names = [self._name(token.id) for token in tokens]
        values = [None if token.logprob is None else _number(token) for token in tokens]
        tops: list[dict[str, float] | None] = []
        for token, name, value in zip(tokens, names, values, strict=True):
            top: dict[str, float] = {}
            for number, logprob in token.top:
                top.setdefault(self._name(number), max(logprob, LEAST))
            tops.append(None if value is None else {**top, name: top.get(name, value)})
        return CompletionLogprobs(names, values, tops, [*places])

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones too."""
        decode = self._tokenizer.decode
        return str(decode([*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def places(self, ids: Sequence[int], text: str) -> list[int]:
        """Return where in a prompt's text each of its tokens begins; one within a character, where that does.

        What the tokens say before the text, a token that begins it or a space that is none, has no place of its own.
        """
        half = codecs.getincrementaldecoder("utf-8")("replace")
        places: list[int] = []
        end = 0
        for token in ids:
            places.append(end)
            end += len(half.decode(self._bytes(token)))
        more = end + len(half.decode(b"", final=True)) - len(text)
        return [max(place - max(more, 0), 0) for place in places]

    def _name(self, token: int) -> str:
        """Return a token's text; one that is no text is written as OpenAI does, and has a name of its own too."""
        text, own = _spelled(self._bytes(token)), self._bytes(token)
        return text if text.encode() == own else f"bytes:{text}"

    def _bytes(self, token: int) -> bytes:
        """Return what a token stands for within a text: with its space, and where it is half a character, that half."""
        known = self._known.get(token)
        if known is None:
            text = self.text([*self._before, token])[len(self.text(self._before)) :]
            known = self._known[token] = self._raw(token, text) if "\ufffd" in text else text.encode()
        return known

    def _raw(self, token: int, text: str) -> bytes:
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if byte := BYTE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        if all(letter in LETTERS for letter in piece):
            return bytes(LETTERS[letter] for letter in piece)
        return text.encode()


def _spelled(own: bytes) -> str:
    return own.decode(errors="backslashreplace")


def _number(token: "Token") -> float:
    assert token.logprob is not None
    return max(token.logprob, LEAST)
