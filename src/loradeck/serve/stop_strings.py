"""An answer's text as its tokens come, up to a stop string. Knows a tokenizer and strings; knows no engine."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from loradeck.base.text import Detokenizer


class StopFilter:
    """Text that never takes anything back: what may be the beginning of a stop string is held until it is known.

    Attributes:
        length: characters that have come, given or held.
        stopped: whether a stop string has come; neither it nor what follows is given.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """`before` are the tokens that the text goes on from, if it is not a text of its own."""
        self.length = 0
        self.stopped = False
        self._pieces = Detokenizer(tokenizer, before)
        self._stops = stops
        self._held = ""

    def push(self, token: int) -> str:
        """Return the text that can be given once `token` has come."""
        piece = self._pieces.push(token)
        self.length += len(piece)
        self._held += piece
        places = [self._held.find(stop) for stop in self._stops]
        self.stopped = any(place >= 0 for place in places)
        if self.stopped:
            return self._give(min(place for place in places if place >= 0))
        return self._give(len(self._held) - max((_begun(self._held, stop) for stop in self._stops), default=0))

    def flush(self) -> str:
        """Return the text that was held, now that no token follows; of a character that is not whole, nothing."""
        return "" if self.stopped else self._give(len(self._held))

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def _begun(text: str, stop: str) -> int:
    """Return with how many characters of `stop` the text ends."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
