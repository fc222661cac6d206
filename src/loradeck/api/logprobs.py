"""Log-probabilities as clients read them: tokens by their text and bytes instead of ids."""

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from loradeck.api.responses import CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loradeck.sampling import Token

MIN_LOGPROB = -9999.0  # OpenAI's value for "never": JSON has no infinity
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's token for one byte
# GPT-2's byte-level vocabularies write each byte as a character: printable bytes as themselves, the others from U+0100
# on (bytes_to_unicode in its encoder.py).
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + at): byte for at, byte in enumerate(UNPRINTABLE)}


class LogprobFormatter:
    """Formats the tokens of one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._bytes_of: dict[int, bytes] = {}
        self._context: list[int] = tokenizer.encode("a", add_special_tokens=False)

    def chat(self, token: "Token") -> TokenLogprob:
        r"""Return a token for a chat completion; incomplete characters are written as bytes, such as \xf0\x9f."""

        def top_logprob(number: int, logprob: float) -> TopLogprob:
            raw = self._bytes(number)
            return TopLogprob(_escape(raw), max(logprob, MIN_LOGPROB), [*raw])

        chosen = top_logprob(token.id, _logprob(token))
        return TokenLogprob(chosen.token, chosen.logprob, chosen.bytes, [top_logprob(*top) for top in token.top])

    def completion(self, tokens: "Sequence[Token]", offsets: Sequence[int]) -> CompletionLogprobs:
        """Return tokens for a completion, each with the offset in the text at which it begins.

        A token is always among the most likely ones at its position. Of two tokens with one name, the more likely
        one is listed.
        """
        names = [self._name(token.id) for token in tokens]
        logprobs = [None if token.logprob is None else _logprob(token) for token in tokens]
        tops: list[dict[str, float] | None] = []
        for token, name, logprob in zip(tokens, names, logprobs, strict=True):
            top: dict[str, float] = {}
            for number, value in token.top:
                top.setdefault(self._name(number), max(value, MIN_LOGPROB))
            tops.append(None if logprob is None else {**top, name: top.get(name, logprob)})
        return CompletionLogprobs(names, logprobs, tops, [*offsets])

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special tokens included."""
        decode = self._tokenizer.decode
        return str(decode([*ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Return the offset in a prompt's text at which each of its tokens begins.

        A token within a character begins where the character does. What the tokens add before the text, such as a
        token for its beginning or a space, has no offset of its own.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets: list[int] = []
        end = 0
        for token in ids:
            offsets.append(end)
            end += len(decoder.decode(self._bytes(token)))
        added = max(end + len(decoder.decode(b"", final=True)) - len(text), 0)
        return [max(offset - added, 0) for offset in offsets]

    def _name(self, token: int) -> str:
        """Return a token's text, or a name of its own for a token that is not valid text, as OpenAI does."""
        raw = self._bytes(token)
        text = _escape(raw)
        return text if text.encode() == raw else f"bytes:{text}"

    def _bytes(self, token: int) -> bytes:
        """Return a token's bytes within a text: with its leading space, and if incomplete, its part of a character."""
        if token not in self._bytes_of:
            text = self.text([*self._context, token])[len(self.text(self._context)) :]
            self._bytes_of[token] = self._raw_bytes(token, text) if "\ufffd" in text else text.encode()
        return self._bytes_of[token]

    def _raw_bytes(self, token: int, text: str) -> bytes:
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(match[1])
        if all(character in BYTE_OF for character in piece):
            return bytes(BYTE_OF[character] for character in piece)
        return text.encode()


@lru_cache(maxsize=32)
def formatter_of(tokenizer: "PreTrainedTokenizerBase") -> LogprobFormatter:
    """Return the formatter of a tokenizer, with the tokens that it has seen."""
    return LogprobFormatter(tokenizer)


def _escape(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")


def _logprob(token: "Token") -> float:
    assert token.logprob is not None
    return max(token.logprob, MIN_LOGPROB)
