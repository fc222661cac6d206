"""A replica: a whole server in a process of its own, without a socket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from starlette.types import Message

from loradeck.api.service import ServiceConfig, serving
from loradeck.base.onednn import cap_kernel_cache


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request as the ingress passes it on."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes


class Replica:
    """Answers requests by the application of `loradeck serve`."""

    def __init__(self, config: ServiceConfig) -> None:
        """Load the base. Ray starts no replica where that fails."""
        cap_kernel_cache()
        self._stack = ExitStack()
        self._service = self._stack.enter_context(serving(config, config.api_keys(), config.store()))

    async def respond(self, request: HttpRequest) -> AsyncIterator[Message]:
        """Yield the ASGI messages of a response. A caller that goes away ends the request, as a client's disconnect."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        is_gone = asyncio.Event()
        bodies = [request.body]

        async def receive() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await is_gone.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": request.method,
            "path": request.path,
            "raw_path": request.path.encode(),
            "root_path": "",
            "query_string": request.query,
            "headers": request.headers,
            "client": request.client,
            "server": None,
        }
        answering = asyncio.create_task(self._service.application(scope, receive, messages.put))
        answering.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            await answering
        finally:
            is_gone.set()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([answering])

    def __del__(self) -> None:
        """Stop the engine, when Ray has let running requests finish."""
        self._stack.close()
