"""A stream between the engine's thread and its reader: a thread, or a task of any loop."""

import asyncio
import threading

import pytest

from loradeck.errors import RequestError
from loradeck.serve.request import Request, SamplingParams, Token
from loradeck.serve.stream import Stream


@pytest.fixture
def woken() -> list[int]:
    """How often the engine was told that something changed."""
    return []


@pytest.fixture
def stream(woken: list[int]) -> Stream:
    return Stream(Request("r", [5], 1, (), SamplingParams()), lambda: woken.append(1))


def feed(stream: Stream, count: int, error: RequestError | None = None) -> threading.Thread:
    """Push tokens 0, 1, … from another thread, then end."""

    def work() -> None:
        for i in range(count):
            stream.push(Token(i))
        stream.end("failed" if error else "stop", error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


async def read(stream: Stream) -> list[int]:
    return [token.id async for token in stream]


def test_a_thread_reads_what_another_pushes(stream: Stream) -> None:
    feed(stream, 1000)
    assert [token.id for token in stream] == [*range(1000)]
    assert stream.finish == "stop"
    assert [*stream] == []


def test_tasks_of_several_loops_read_streams_of_one_engine() -> None:
    streams = [Stream(Request(str(i), [5], 1, (), SamplingParams()), lambda: None) for i in range(8)]
    found: dict[int, list[list[int]]] = {}

    async def all_of(own: list[Stream]) -> list[list[int]]:
        return await asyncio.gather(*map(read, own))

    def work(number: int) -> None:
        found[number] = asyncio.run(all_of(streams[number * 4 : number * 4 + 4]))

    readers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for reader in readers:
        reader.start()
    for stream in streams:
        feed(stream, 200)
    for reader in readers:
        reader.join(20)
    assert found == {0: [[*range(200)]] * 4, 1: [[*range(200)]] * 4}


def test_what_came_before_an_error_is_read_first(stream: Stream) -> None:
    feed(stream, 2, RequestError("it broke")).join()
    assert [next(stream).id, next(stream).id] == [0, 1]
    for _ in range(2):
        with pytest.raises(RequestError, match="it broke"):
            next(stream)
    with pytest.raises(RequestError, match="it broke"):
        asyncio.run(read(stream))


def test_the_first_end_counts(stream: Stream) -> None:
    stream.end("stop")
    stream.end("failed", RequestError("too late"))
    assert [*stream] == []
    assert stream.finish == "stop"


def test_giving_up_tells_the_engine_once(stream: Stream, woken: list[int]) -> None:
    stream.cancel("stop")
    stream.cancel()
    assert (stream.request.cancelled, stream.given_up, woken) == (True, "stop", [1])


def test_giving_up_what_has_ended_is_nothing(stream: Stream, woken: list[int]) -> None:
    stream.end("length")
    stream.cancel()
    assert (stream.request.cancelled, stream.finish, woken) == (False, "length", [])


def test_a_reader_that_was_cancelled_can_read_again(stream: Stream) -> None:
    async def main() -> list[int]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        feed(stream, 3)
        return await read(stream)

    assert asyncio.run(main()) == [0, 1, 2]


def test_a_loop_that_closes_while_it_is_told_does_the_engine_no_harm(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.new_event_loop()
    stream._waiter = loop, loop.create_future()
    loop.close()
    monkeypatch.setattr(loop, "is_closed", lambda: False)  # as it was a moment ago
    stream.push(Token(7))
    assert next(stream) == Token(7)
