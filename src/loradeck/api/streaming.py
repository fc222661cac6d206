"""Server-sent events, and work that ends when its client disconnects.

Sends raw ASGI messages: three times as many per second as starlette's StreamingResponse. The status goes out with the
first event, so an error before it is an ordinary error response.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

PING = b": ping\n"  # no empty line: some clients read one as the end of an event without data
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]

SendEvent: TypeAlias = Callable[[bytes], Awaitable[None]]
T = TypeVar("T")


async def run_until_disconnect(receive: Receive, *work: Coroutine[Any, Any, T]) -> list[T]:
    """Run coroutines concurrently and return their results; if one fails or the client disconnects, cancel the rest.

    Raises:
        ClientDisconnect: the client closed the connection.
        Exception: the first that a coroutine raises.
    """
    try:
        async with asyncio.TaskGroup() as group:
            disconnect = group.create_task(_wait_for_disconnect(receive))
            tasks = [group.create_task(coroutine) for coroutine in work]
            await asyncio.wait(tasks)
            disconnect.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the rest of the body
    raise ClientDisconnect


class EventStream:
    """A response of server-sent events from several concurrent writers; it ends when all of them have."""

    def __init__(
        self,
        writers: Sequence[Callable[[SendEvent], Coroutine[Any, Any, None]]],
        *,
        last: Callable[[], bytes],
        on_error: Callable[[Exception], bytes],
        close: Callable[[], None],
        ping: float,
    ) -> None:
        """Describe the stream.

        Args:
            writers: Each sends its events through the function it is given.
            last: Returns the data of a final event; none if empty.
            on_error: Returns the data of the event that reports an error.
            close: Called at the end, whatever happened.
            ping: Seconds of silence after which a comment is sent.
        """
        self._writers = writers
        self._last = last
        self._on_error = on_error
        self._close = close
        self._ping = ping

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        sender = _EventSender(send)
        pings = asyncio.create_task(sender.ping(self._ping))
        try:
            await run_until_disconnect(receive, *(writer(sender.send_event) for writer in self._writers))
            last = self._last()
        except ClientDisconnect:
            if not sender.started:
                raise
            return
        except Exception as error:
            if not sender.started:
                raise
            last = self._on_error(error)
        finally:
            pings.cancel()
            self._close()
        if last:
            await sender.send_event(last)
        await sender.send(DONE, more=False)


class _EventSender:
    """Sends one response's bytes, one message at a time."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._lock = asyncio.Lock()
        self._last_sent = time.monotonic()

    async def send_event(self, data: bytes) -> None:
        await self.send(b"data: " + data + b"\n\n")

    async def send(self, body: bytes, *, more: bool = True) -> None:
        async with self._lock:
            if not self.started:
                await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                self.started = True
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
            self._last_sent = time.monotonic()

    async def ping(self, interval: float) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._last_sent + interval - time.monotonic()))
            if time.monotonic() - self._last_sent >= interval:
                await self.send(PING)
