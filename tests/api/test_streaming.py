"""A stream on the wire: its order, its pings, its errors before and after the first event, and a client that leaves."""

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from loradeck.api.streaming import PING, EventStream, SendEvent


class Connection:
    """An ASGI connection: what was sent, and whether the client has left."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.disconnected = asyncio.Event()
        self.closed = 0

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def receive(self) -> dict[str, Any]:
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def close(self) -> None:
        self.closed += 1

    async def run(self, *writers: Any, ping: float = 3600, last: bytes = b"") -> bytes:
        stream = EventStream(
            writers, last=lambda: last, on_error=lambda error: str(error).encode(), close=self.close, ping=ping
        )
        await stream({}, self.receive, self.send)
        return self.body


async def hello(send_event: SendEvent) -> None:
    await send_event(b"hello")


async def fail(_: SendEvent) -> None:
    raise ValueError("broken")


def test_events_end_with_done() -> None:
    async def main() -> None:
        connection = Connection()
        assert await connection.run(hello, last=b"usage") == b"data: hello\n\ndata: usage\n\ndata: [DONE]\n\n"
        types = [message["type"] for message in connection.sent]
        assert types == ["http.response.start"] + ["http.response.body"] * 3
        assert [message.get("more_body") for message in connection.sent] == [None, True, True, False]
        assert connection.closed == 1

    asyncio.run(main())


def test_pings_break_a_silence() -> None:
    async def main() -> None:
        connection = Connection()

        async def after_two_pings(send_event: SendEvent) -> None:
            while connection.body.count(PING) < 2:
                await asyncio.sleep(0.001)
            await send_event(b"late")

        body = await connection.run(after_two_pings, ping=0.002)
        assert body.startswith(b": ping\n: ping\n")
        assert body.endswith(b"data: [DONE]\n\n")
        assert body.replace(PING, b"") == b"data: late\n\ndata: [DONE]\n\n"

    asyncio.run(main())


def test_a_ping_is_no_event_for_a_client_that_ends_one_at_every_empty_line() -> None:
    """The specification takes an empty line without data for nothing; openai-go took it for an event without data."""

    async def main() -> None:
        connection = Connection()

        async def slow(send_event: SendEvent) -> None:
            for data in (b"a", b"b"):
                pings = connection.body.count(PING)
                while connection.body.count(PING) == pings:
                    await asyncio.sleep(0.001)
                await send_event(data)

        body = await connection.run(slow, ping=0.002)
        assert body.count(PING) >= 2
        events = [[line for line in event.split(b"\n") if line[:1] != b":"] for event in body.split(b"\n\n")[:-1]]
        assert events == [[b"data: a"], [b"data: b"], [b"data: [DONE]"]]

    asyncio.run(main())


def test_an_error_before_the_first_event_is_raised() -> None:
    async def main() -> None:
        connection = Connection()
        with pytest.raises(ValueError, match="broken"):
            await connection.run(fail)
        assert (connection.sent, connection.closed) == ([], 1)

    asyncio.run(main())


def test_a_later_error_is_an_event_and_ends_the_other_writers() -> None:
    async def hello_then_fail(send_event: SendEvent) -> None:
        await send_event(b"hello")
        raise ValueError("broken")

    async def forever(_: SendEvent) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        connection = Connection()
        body = await connection.run(hello_then_fail, forever)
        assert body == b"data: hello\n\ndata: broken\n\ndata: [DONE]\n\n"
        assert connection.closed == 1

    asyncio.run(main())


def test_a_client_that_leaves_before_the_first_event_gets_no_response() -> None:
    async def main() -> None:
        connection = Connection()

        async def wait(_: SendEvent) -> None:
            connection.disconnected.set()
            await asyncio.Event().wait()

        with pytest.raises(ClientDisconnect):  # so that the log has the same line as for a whole answer
            await connection.run(wait)
        assert (connection.sent, connection.closed) == ([], 1)

    asyncio.run(main())


def test_a_client_that_leaves_ends_the_stream() -> None:
    async def main() -> None:
        connection = Connection()

        async def hello_then_wait(send_event: SendEvent) -> None:
            await send_event(b"hello")
            connection.disconnected.set()
            await asyncio.Event().wait()

        assert await connection.run(hello_then_wait) == b"data: hello\n\n"
        assert connection.closed == 1

    asyncio.run(main())
