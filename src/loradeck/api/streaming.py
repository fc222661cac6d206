"""A stream of server-sent events. Knows ASGI's messages and the wire format; knows nothing of what is told.

Sends raw ASGI messages: three times as many a second as starlette's StreamingResponse. The status goes out with the
first bytes, so what fails before them is an ordinary error.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from loradeck.api.disconnect import attend

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]

Tell = Callable[[bytes], Awaitable[None]]


class Events:
    """An answer that several writers write, each an event at a time, until all have ended."""

    def __init__(
        self,
        writers: Sequence[Callable[[Tell], Coroutine[Any, Any, None]]],
        last: Callable[[], bytes],
        failed: Callable[[Exception], bytes],
        close: Callable[[], None],
        ping: float,
    ) -> None:
        """`last` are the data of an event after all others, `failed` those of an error; at the end comes `close`."""
        self._writers = writers
        self._last = last
        self._failed = failed
        self._close = close
        self._ping = ping

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        wire = _Wire(send)
        pings = asyncio.create_task(wire.ping(self._ping))
        try:
            await attend(receive, *(writer(wire.tell) for writer in self._writers))
            end = self._last()
        except ClientDisconnect:
            return
        except Exception as error:
            if not wire.begun:
                raise
            end = self._failed(error)
        finally:
            pings.cancel()
            self._close()
        if end:
            await wire.tell(end)
        await wire.send(DONE, more=False)


class _Wire:
    """One answer's bytes in their order, whoever sends them."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._turn = asyncio.Lock()
        self._sent = time.monotonic()
        self.begun = False

    async def tell(self, data: bytes) -> None:
        await self.send(b"data: " + data + b"\n\n")

    async def send(self, body: bytes, *, more: bool = True) -> None:
        async with self._turn:
            if not self.begun:
                await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                self.begun = True
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
            self._sent = time.monotonic()

    async def ping(self, every: float) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._sent + every - time.monotonic()))
            if time.monotonic() - self._sent >= every:
                await self.send(PING)
