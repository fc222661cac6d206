"""Sends what the engine generates, whole or as a stream of events, in the shape of any route."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.disconnect import attend
from loradeck.api.errors import JSON, answer_of, body_of, concealed, ending
from loradeck.api.requests import Generation as GenerationRequest
from loradeck.api.responses import CachedTokens, Ended, Usage
from loradeck.api.state import ServerState
from loradeck.api.streaming import Events, Tell

if TYPE_CHECKING:
    from loradeck.serve.generation import Generation, TextChunk


class Shape(Protocol):
    """The JSON of one route. A choice is known by its index, as in the JSON."""

    def whole(self, generations: "Sequence[Generation]", chunks: "Sequence[Sequence[TextChunk]]", usage: Usage) -> Any:
        """Return the body of an answer that is not streamed."""
        ...

    def begin(self, index: int, generation: "Generation", /) -> Any:
        """Return a choice's first event, or None."""
        ...

    def grow(self, index: int, chunk: "TextChunk") -> Any:
        """Return the event of a chunk, or None if it has nothing to say."""
        ...

    def end(self, index: int, generation: "Generation") -> Any:
        """Return a choice's last event."""
        ...

    def usage(self, usage: Usage) -> Any:
        """Return the event with the tokens of all choices."""
        ...


async def answer(
    door: ServerState, request: Request, asked: GenerationRequest, generations: "Sequence[Generation]", shape: Shape
) -> Response | Events:
    """Return the answer to a request; when it is sent, or the client has gone, the generations are released."""

    def usage() -> Usage:
        return usage_of(generations, asked.n or 1)

    if asked.stream:

        def last() -> bytes:
            wanted = asked.stream_options is not None and asked.stream_options.include_usage
            return msgspec.json.encode(shape.usage(usage())) if wanted else b""

        def failed(failure: Exception) -> bytes:
            error, _ = answer_of(failure)
            error.message = concealed(error.message, door.folder)
            return body_of(error)

        writers = [partial(_write, index, generation, shape) for index, generation in enumerate(generations)]
        return Events(writers, last, failed, partial(door.release, generations), door.settings.ping)
    try:
        chunks = await attend(request.receive, *map(_collect, generations))
    finally:
        door.release(generations)
    return Response(msgspec.json.encode(shape.whole(generations, chunks, usage())), media_type=JSON)


async def _chunks(generation: "Generation") -> "AsyncIterator[TextChunk]":
    """Yield an answer's text.

    Raises:
        LoradeckError: the request failed.
        HttpError: 503, the engine cancelled it because the server is shutting down.
    """
    async for chunk in generation.chunks():
        yield chunk
    if generation.finish == "cancelled":
        raise ending()


async def _collect(generation: "Generation") -> "list[TextChunk]":
    return [chunk async for chunk in _chunks(generation)]


async def _write(index: int, generation: "Generation", shape: Shape, tell: Tell) -> None:
    begun = False

    async def event(made: Any) -> None:
        if made is not None:
            await tell(msgspec.json.encode(made))

    async for chunk in _chunks(generation):
        if not begun:  # not earlier: an error before the first token is answered with its own status
            begun = True
            await event(shape.begin(index, generation))
        await event(shape.grow(index, chunk))
    if not begun:
        await event(shape.begin(index, generation))
    await event(shape.end(index, generation))


def finish_of(generation: "Generation") -> Ended:
    """Return why an answer ended; only answers that were neither cancelled nor failed are sent."""
    assert generation.finish in ("stop", "length")
    return generation.finish


def usage_of(generations: "Sequence[Generation]", n: int) -> Usage:
    """Return the tokens of a request. A prompt with `n` answers counts once."""
    firsts = [generation.request for generation in generations[::n]]
    read = sum(request.prompt_length for request in firsts)
    written = sum(generation.request.generated for generation in generations)
    return Usage(read, written, read + written, CachedTokens(sum(request.cached for request in firsts)))
