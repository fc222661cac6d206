"""A stream on the wire: its order, its pings, its errors before and after the first byte, and a client that goes."""

import asyncio
from typing import Any

import pytest

from loradeck.api.streaming import EventStream, SendEvent


class Wire:
    """An ASGI connection: what was sent, and when the client goes."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.closed = 0

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def close(self) -> None:
        self.closed += 1

    async def run(self, *writers: Any, ping: float = 60, last: bytes = b"") -> bytes:
        events = EventStream(
            writers, last=lambda: last, on_error=lambda error: str(error).encode(), close=self.close, ping=ping
        )
        await events({}, self.receive, self.send)
        return b"".join(message.get("body", b"") for message in self.sent)


async def hello(tell: SendEvent) -> None:
    await tell(b"hello")


def test_events_end_with_done() -> None:
    async def main() -> None:
        wire = Wire()
        assert await wire.run(hello, last=b"usage") == b"data: hello\n\ndata: usage\n\ndata: [DONE]\n\n"
        assert [message["type"] for message in wire.sent] == ["http.response.start"] + ["http.response.body"] * 3
        assert [message.get("more_body") for message in wire.sent] == [None, True, True, False]
        assert wire.closed == 1

    asyncio.run(main())


def test_silence_is_broken_by_pings() -> None:
    async def late(tell: SendEvent) -> None:
        await asyncio.sleep(0.2)
        await tell(b"late")

    async def main() -> None:
        said = await Wire().run(late, ping=0.02)
        assert said.startswith(b": ping\n\n: ping\n\n")
        assert said.endswith(b"data: late\n\ndata: [DONE]\n\n")

    asyncio.run(main())


async def fail(_: SendEvent) -> None:
    raise ValueError("broken")


def test_an_error_before_the_first_byte_is_an_ordinary_one() -> None:
    async def main() -> None:
        wire = Wire()
        with pytest.raises(ValueError, match="broken"):
            await wire.run(fail)
        assert (wire.sent, wire.closed) == ([], 1)

    asyncio.run(main())


def test_an_error_after_it_is_told_and_ends_the_others() -> None:
    async def hello_then_fail(tell: SendEvent) -> None:
        await tell(b"hello")
        raise ValueError("broken")

    async def forever(_: SendEvent) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        wire = Wire()
        assert await wire.run(hello_then_fail, forever) == b"data: hello\n\ndata: broken\n\ndata: [DONE]\n\n"
        assert wire.closed == 1

    asyncio.run(main())


def test_nothing_is_written_for_a_client_that_has_gone() -> None:
    async def main() -> None:
        wire = Wire()

        async def hello_then_wait(tell: SendEvent) -> None:
            await tell(b"hello")
            wire.gone.set()
            await asyncio.Event().wait()

        assert await wire.run(hello_then_wait) == b"data: hello\n\n"
        assert wire.closed == 1

    asyncio.run(main())
