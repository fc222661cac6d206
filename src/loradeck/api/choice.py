"""One of the answers that a request asked for: text as its tokens come, up to a stop string. Knows no shape."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loradeck.api.errors import ending

if TYPE_CHECKING:
    from loradeck.api.responses import Ended
    from loradeck.serve.request import Token
    from loradeck.serve.stop_strings import StopFilter
    from loradeck.serve.stream import Stream


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer grew by: a token whose text may still be held back, or the text that was."""

    text: str
    token: "Token | None" = None
    place: int = 0
    """Characters of the answer before the token."""


@dataclass(eq=False, slots=True)
class Choice:
    """An answer on its way."""

    index: int
    number: int
    """Among the answers to the same prompt."""
    prompt: Sequence[int]
    stream: "Stream"
    text: "StopFilter"
    echo: str = field(init=False, default="")
    """The prompt's text, where it is said before the answer."""
    count: int = field(init=False, default=0)
    """Tokens so far."""
    finish: "Ended" = field(init=False, default="length")
    """Set at the end."""

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the answer, piece by piece.

        Raises:
            LoradeckError: the request failed, or the server ends.
        """
        async for token in self.stream:
            self.count += 1
            place = self.text.length
            yield Piece("" if token.ends else self.text.push(token.id), token, place)
            if self.text.stopped:
                self.stream.cancel("stop")
                self.finish = "stop"
                return
        rest = self.text.flush()
        if rest:
            yield Piece(rest)
        match self.stream.finish:
            case "stop" | "length" as finish:
                self.finish = finish
            case _:
                raise ending()
