"""A server that has too much to do, is about to end, or cannot go on: what its clients are told."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from loradeck import AdapterStore, Base
from loradeck.api.metrics import Metrics
from loradeck.api.state import ServerState
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

from .conftest import Serve

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "ignore_eos": True}


@pytest.fixture
def slow(base: Base, store: AdapterStore, metrics: Metrics) -> Iterator[Callable[..., Serve]]:
    """Call it with an engine's settings for an application whose steps take 5 ms at least."""
    engines: list[Engine] = []

    def make(**config: Any) -> Serve:
        engine = Engine(base, store, EngineConfig(**config), observer=metrics)
        engine._runner.model.register_forward_pre_hook(lambda *_: time.sleep(0.005))
        engines.append(engine)
        return Serve(engine, metrics)

    yield make
    for engine in engines:
        engine.close()


def asked(serve: Serve, test: Callable[..., Any], **fields: Any) -> Any:
    """Await `test` with a client on a socket, the lines of a stream that has begun, and the application's state."""

    async def main(url: str, door: ServerState) -> Any:
        async with (
            httpx.AsyncClient(base_url=url, timeout=30) as client,
            client.stream("POST", CHAT, json={**LONG, "stream": True, **fields}) as answer,
        ):
            lines = answer.aiter_lines()
            assert "assistant" in await anext(lines)
            return await test(client, lines, door)

    with serve.on_a_socket() as (url, door):
        return asyncio.run(main(url, door))


def test_who_comes_when_too_many_wait_is_told_when_to_ask_again(slow: Callable[..., Serve]) -> None:
    serve = slow(max_rows=1, max_waiting=2)

    async def test(client: httpx.AsyncClient, *_: Any) -> Any:
        waiting = [asyncio.create_task(client.post(CHAT, json=LONG)) for _ in range(2)]
        while serve.engine.stats.waiting < 2:
            await asyncio.sleep(0.01)
        refused = [await client.post(CHAT, json={**LONG, "n": n}) for n in (1, 2)]
        for task in waiting:
            task.cancel()
        return refused

    for answer in asked(serve, test):
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "RateLimitError"
        assert int(answer.headers["retry-after"]) >= 1


def test_a_request_that_fails_on_the_way_says_so_in_its_stream(slow: Callable[..., Serve]) -> None:
    serve = slow(timeout=0.4)
    events = serve.events(CHAT, LONG)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "not done within 0.4 s" in events[-1]["error"]["message"]
    assert events[-1]["error"]["code"] == 500
    assert serve.ask(CHAT, LONG).status_code == 500


def test_a_server_that_ends_lets_streams_end(slow: Callable[..., Serve]) -> None:
    async def test(client: httpx.AsyncClient, lines: Any, door: ServerState) -> Any:
        drained = asyncio.create_task(asyncio.to_thread(door.drain, 20))
        while not door.draining:
            await asyncio.sleep(0.01)
        late, health = await client.post(CHAT, json=LONG), await client.get("/health")
        told = [line async for line in lines if line]
        await drained
        return late, health, told

    late, health, told = asked(slow(), test)
    assert (late.status_code, health.status_code) == (503, 503)
    assert late.json()["error"]["type"] == health.json()["error"]["type"] == "unavailable_error"
    assert late.headers["retry-after"] == "1"
    assert '"finish_reason":"length"' in told[-2]
    assert told[-1] == "data: [DONE]"


def test_what_does_not_end_in_time_is_ended(slow: Callable[..., Serve]) -> None:
    async def test(_: Any, lines: Any, door: ServerState) -> Any:
        await asyncio.to_thread(door.drain, 0.1)
        return [line async for line in lines if line]

    told = asked(slow(), test)
    assert '"code":503' in told[-2]
    assert told[-1] == "data: [DONE]"


def test_an_engine_that_failed_is_not_healthy(slow: Callable[..., Serve], monkeypatch: pytest.MonkeyPatch) -> None:
    serve = slow()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def test(client: httpx.AsyncClient, lines: Any, _: Any) -> Any:
        monkeypatch.setattr(serve.engine._loop._scheduler, "next", fail)
        told = [line async for line in lines if line]
        return told, await client.post(CHAT, json=LONG), await client.get("/health")

    told, late, health = asked(serve, test)
    assert "the engine has failed" in told[-2]
    assert (late.status_code, health.status_code) == (503, 503)
    serve.engine.drain(0)  # comes back


def test_metrics_name_what_runs(slow: Callable[..., Serve]) -> None:
    async def test(client: httpx.AsyncClient, *_: Any) -> str:
        return (await client.get("/metrics")).text

    text = asked(slow(), test, model="poet@1*0.5+pirate")
    assert 'running_lora_adapters="pirate,poet",waiting_lora_adapters=""' in text
    assert 'loradeck_adapter_requests_running{adapter="<blend>"} 1.0' in text
    assert 'loradeck_adapter_loaded{adapter="pirate",pinned="true",tier="device"} 1.0' in text
    assert 'vllm:num_requests_running{model_name="tiny"} 1.0' in text
