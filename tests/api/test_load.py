"""A server that is full, shuts down, or whose engine fails: what its clients are told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
import pytest

from loradeck import AdapterStore, Base
from loradeck.api.metrics import Metrics
from loradeck.api.state import ServerState
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

from .conftest import TIMEOUT, LocalServer, StepGate, until

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "ignore_eos": True}
T = TypeVar("T")


@dataclass
class Scene:
    """A stream that has begun, on an engine whose further steps wait for the gate."""

    client: httpx.AsyncClient
    lines: AsyncIterator[str]
    state: ServerState
    gate: StepGate

    async def rest(self) -> list[str]:
        """The remaining lines of the stream, with all steps allowed."""
        self.gate.open()
        return [line async for line in self.lines if line]


@pytest.fixture
def gated(base: Base, store: AdapterStore, metrics: Metrics) -> Iterator[Callable[..., tuple[LocalServer, StepGate]]]:
    """Call it with an engine's settings for an application, and the gate of its steps."""
    engines: list[Engine] = []

    def make(**settings: Any) -> tuple[LocalServer, StepGate]:
        engines.append(Engine(base, store, EngineConfig(**settings), observer=metrics))
        return LocalServer(engines[-1], metrics), StepGate(engines[-1])

    yield make
    for engine in engines:
        engine.close()


def during_a_stream(server: LocalServer, gate: StepGate, test: Callable[[Scene], Awaitable[T]], **fields: Any) -> T:
    """Await `test` while a stream is in progress."""

    async def main(url: str, state: ServerState) -> T:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
            gate.allow(1)
            async with client.stream("POST", CHAT, json={**LONG, "stream": True, **fields}) as response:
                lines = response.aiter_lines()
                assert "assistant" in await anext(lines)
                try:
                    return await test(Scene(client, lines, state, gate))
                finally:
                    gate.open()

    with server.listening() as (url, state):
        return asyncio.run(main(url, state))


def test_a_full_queue_is_a_429_with_retry_after(gated: Callable[..., Any]) -> None:
    async def test(scene: Scene) -> Any:
        waiting = [asyncio.create_task(scene.client.post(CHAT, json=LONG)) for _ in range(2)]
        await until(lambda: len(scene.state.live) == 3)
        refused = [await scene.client.post(CHAT, json={**LONG, "n": n}) for n in (1, 2)]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return refused

    for response in during_a_stream(*gated(max_rows=1, max_waiting=2), test):
        assert response.status_code == 429
        assert response.json()["error"]["type"] == "RateLimitError"
        assert int(response.headers["retry-after"]) >= 1


def test_a_failure_during_a_stream_is_its_last_event(gated: Callable[..., Any]) -> None:
    async def test(scene: Scene) -> Any:
        scheduler = scene.state.engine._loop._scheduler
        scheduler.config = replace(scheduler.config, timeout=1e-9)
        return await scene.rest(), await scene.client.post(CHAT, json=LONG)

    lines, late = during_a_stream(*gated(), test)
    assert "not done within" in lines[-2]
    assert '"code":504' in lines[-2]
    assert lines[-1] == "data: [DONE]"
    assert (late.status_code, late.headers["x-should-retry"]) == (504, "false")


def test_a_server_that_shuts_down_finishes_its_streams(gated: Callable[..., Any]) -> None:
    async def test(scene: Scene) -> Any:
        drain = asyncio.create_task(asyncio.to_thread(scene.state.drain, TIMEOUT))
        await until(lambda: scene.state.draining)
        late, health = await scene.client.post(CHAT, json=LONG), await scene.client.get("/health")
        lines = await scene.rest()
        await drain
        return late, health, lines

    late, health, lines = during_a_stream(*gated(), test)
    assert (late.status_code, health.status_code) == (503, 503)
    assert late.json()["error"]["type"] == health.json()["error"]["type"] == "unavailable_error"
    assert late.json()["error"]["message"] == "The server is shutting down."
    assert late.headers["retry-after"] == "1"
    assert '"finish_reason":"length"' in lines[-2]
    assert lines[-1] == "data: [DONE]"


def test_a_stream_that_outlasts_the_drain_is_ended(gated: Callable[..., Any]) -> None:
    async def test(scene: Scene) -> Any:
        drain = asyncio.create_task(asyncio.to_thread(scene.state.drain, 0))
        await until(lambda: all(generation.request.cancelled for generation in scene.state.live))
        lines = await scene.rest()
        await drain
        return lines

    lines = during_a_stream(*gated(), test)
    assert '"code":503' in lines[-2]
    assert lines[-1] == "data: [DONE]"


def test_an_engine_that_failed_is_not_healthy(gated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server, gate = gated()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def test(scene: Scene) -> Any:
        monkeypatch.setattr(server.engine._loop._scheduler, "schedule", fail)
        return await scene.rest(), await scene.client.post(CHAT, json=LONG), await scene.client.get("/health")

    lines, late, health = during_a_stream(server, gate, test)
    assert "the engine failed" in lines[-2]
    assert (late.status_code, health.status_code) == (503, 503)
    server.engine.drain(0)  # returns


def test_metrics_name_the_running_adapters(gated: Callable[..., Any]) -> None:
    async def test(scene: Scene) -> str:
        return (await scene.client.get("/metrics")).text

    text = during_a_stream(*gated(), test, model="poet@1*0.5+pirate")
    assert 'running_lora_adapters="pirate,poet",waiting_lora_adapters=""' in text
    assert 'loradeck_adapter_requests_running{adapter="<blend>"} 1.0' in text
    assert 'loradeck_adapter_loaded{adapter="pirate",pinned="true",tier="device"} 1.0' in text
    assert 'vllm:num_requests_running{model_name="tiny"} 1.0' in text
