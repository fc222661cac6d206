"""Who wants to know what an engine does, for metrics. Called in the engine's thread, so it must be quick."""

from typing import Literal, Protocol

from loradeck.serve.request import Request

Finish = Literal["stop", "length", "cancelled", "failed"]


class Observer(Protocol):
    """Told of every request's steps; the times are on the request."""

    def admitted(self, request: Request) -> None:
        """It left the queue, and its prompt is read from now on."""
        ...

    def token(self, request: Request, since: float) -> None:
        """It got a token, `since` seconds after the one before, or after its arrival."""
        ...

    def finished(self, request: Request, finish: Finish) -> None:
        """It ended."""
        ...
