"""The text of an answer as its tokens arrive, up to the first stop string."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from loradeck.base.text import Detokenizer


class StopFilter:
    """Detokenizes an answer and holds back text that may be the beginning of a stop string.

    Special tokens are no part of the text, but a stop string may name them, alone or within other text.

    Attributes:
        length: characters decoded so far, the held ones included.
        stopped: whether a stop string is complete; neither it nor the text after it is ever returned.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str] = (),
        context: Sequence[int] = (),
        *,
        min_tokens: int = 0,
    ) -> None:
        """`context` holds the tokens that the text continues. The first `min_tokens` tokens complete no stop string."""
        self.length = 0
        self.stopped = False
        self._detokenizer = Detokenizer(tokenizer, context)
        self._specials = _special_tokens(tokenizer) if stops else {}
        named = _that_name(self._specials.values(), stops)
        self._text = _Search(stops)  # what the client reads; a model may also spell a special token's name out
        self._tokens = _Search(named)  # the same, with special tokens
        self._held = ""
        self._exempt_tokens = min_tokens

    def push(self, token: int) -> str:
        """Return the text that is final once `token` is there."""
        text = self._detokenizer.push(token)
        self.length += len(text)
        self._held += text
        exempt = self._exempt_tokens > 0
        self._exempt_tokens -= exempt
        self._text.push(text, "", exempt=exempt)
        self._tokens.push(text, self._specials.get(token, ""), exempt=exempt)
        searches = (self._text, self._tokens)
        self.stopped = any(search.stopped for search in searches)
        final = min(search.final for search in searches if search.stopped or not self.stopped)
        return self._release(final - (self.length - len(self._held)))

    def flush(self) -> str:
        """Return the held text after the last token. An incomplete character is dropped."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


class _Search:
    """Looks for strings in a text that grows.

    Attributes:
        final: characters before the part of the text that is, or may begin, one of the strings; hidden ones excluded.
        stopped: whether one is complete.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.final = 0
        self.stopped = False
        self._strings = strings
        self._held = ""
        self._shown = ""  # for each character of the held text, "1", or "0" if it is hidden
        self._exempt = 0  # characters of the held text in which no string may end

    def push(self, text: str, hidden: str, *, exempt: bool) -> None:
        """Add text, then hidden text; if `exempt`, no string may end in it."""
        if not self._strings:
            self.final += len(text)
            return
        self._held += text + hidden
        self._shown += "1" * len(text) + "0" * len(hidden)
        if exempt:
            self._exempt = len(self._held)
        starts = [start for string in self._strings if (start := self._find(string)) >= 0]
        self.stopped = bool(starts)
        overlap = 0 if starts else max(_overlap(self._held, string) for string in self._strings)
        self._drop(min(starts, default=len(self._held) - overlap))

    def _find(self, string: str) -> int:
        return self._held.find(string, max(0, self._exempt + 1 - len(string)))

    def _drop(self, length: int) -> None:
        self.final += self._shown.count("1", 0, length)
        self._held, self._shown = self._held[length:], self._shown[length:]
        self._exempt = max(0, self._exempt - length)


@lru_cache(maxsize=32)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _that_name(tokens: Iterable[str], stops: Sequence[str]) -> list[str]:
    text = "\0".join(stops)
    used = [token for token in tokens if token in text]  # of thousands
    return [stop for stop in stops if any(token in stop for token in used)]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
