"""The text of an answer as its tokens arrive, up to the first stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from loradeck.base.text import Detokenizer


class StopFilter:
    """Detokenizes an answer and holds back text that may be the beginning of a stop string.

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
        self._stops = stops
        self._held = ""
        self._exempt_tokens = min_tokens
        self._exempt = 0  # characters of the held text in which no stop string may end

    def push(self, token: int) -> str:
        """Return the text that is final once `token` is there."""
        text = self._detokenizer.push(token)
        self.length += len(text)
        self._held += text
        if self._exempt_tokens:
            self._exempt_tokens -= 1
            self._exempt = len(self._held)
        starts = [start for stop in self._stops if (start := self._find(stop)) >= 0]
        if starts:
            self.stopped = True
            return self._release(min(starts))
        return self._release(len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0))

    def flush(self) -> str:
        """Return the held text after the last token. An incomplete character is dropped."""
        return "" if self.stopped else self._release(len(self._held))

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._exempt + 1 - len(stop)))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._exempt = max(0, self._exempt - length)
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
