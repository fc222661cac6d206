"""From an engine's streams to an answer, whole or as it comes, for every kind of generation. Knows no kind's shapes."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.choice import Choice, Piece
from loradeck.api.disconnect import attend
from loradeck.api.errors import JSON, answer_of, body_of, concealed
from loradeck.api.requests import Generation
from loradeck.api.responses import CachedTokens, Usage
from loradeck.api.state import ServerState
from loradeck.api.streaming import Events, Tell


class Shape(Protocol):
    """How one request's answer looks."""

    def whole(self, choices: Sequence[Choice], texts: Sequence[Sequence[Piece]], usage: Usage) -> Any:
        """Return the answer that is sent at once."""
        ...

    def begun(self, choice: Choice) -> Any:
        """Return the event that comes before a choice's others, or None."""
        ...

    def grown(self, choice: Choice, piece: Piece) -> Any:
        """Return the event of a piece, or None where it tells nothing."""
        ...

    def ended(self, choice: Choice) -> Any:
        """Return the event of a choice's end."""
        ...

    def spent(self, usage: Usage) -> Any:
        """Return the event of the tokens that all choices took."""
        ...


async def answer(
    door: ServerState, request: Request, asked: Generation, choices: Sequence[Choice], shape: Shape
) -> Response | Events:
    """Return the answer to a request whose choices are on their way; it frees them, whatever happens."""
    streams = [choice.stream for choice in choices]
    if asked.stream:

        def last() -> bytes:
            wanted = asked.stream_options is not None and asked.stream_options.include_usage
            return msgspec.json.encode(shape.spent(usage_of(choices))) if wanted else b""

        def failed(failure: Exception) -> bytes:
            error, _ = answer_of(failure)
            error.message = concealed(error.message, door.folder)
            return body_of(error)

        writers = [partial(_write, choice, shape) for choice in choices]
        return Events(writers, last, failed, partial(door.release, streams), door.settings.ping)
    try:
        texts = await attend(request.receive, *(_collect(choice) for choice in choices))
    finally:
        door.release(streams)
    return Response(msgspec.json.encode(shape.whole(choices, texts, usage_of(choices))), media_type=JSON)


async def _collect(choice: Choice) -> list[Piece]:
    return [piece async for piece in choice.pieces()]


async def _write(choice: Choice, shape: Shape, tell: Tell) -> None:
    begun = False

    async def event(made: Any) -> None:
        if made is not None:
            await tell(msgspec.json.encode(made))

    async for piece in choice.pieces():
        if not begun:  # not before: what fails until then is answered with its status
            begun = True
            await event(shape.begun(choice))
        await event(shape.grown(choice, piece))
    if not begun:
        await event(shape.begun(choice))
    await event(shape.ended(choice))


def usage_of(choices: Sequence[Choice]) -> Usage:
    """Return the tokens that a request took; several answers to one prompt count it once."""
    firsts = [choice.stream.request for choice in choices if choice.number == 0]
    read = sum(request.prompt_length for request in firsts)
    written = sum(choice.count for choice in choices)
    return Usage(read, written, read + written, CachedTokens(sum(request.cached for request in firsts)))
