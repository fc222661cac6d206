"""A tiny base, a store of tiny adapters, an engine on them, and its application in this process."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck import Adapter, AdapterStore, Base, LoraConfig
from loradeck.api.app import app
from loradeck.api.metrics import Metrics
from loradeck.api.server import Server, listen, url_of
from loradeck.api.state import ServerState
from loradeck.base.fingerprint import fingerprint
from loradeck.live.config import LiveConfig
from loradeck.live.live_training import LiveTraining
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

T = TypeVar("T")
URL = "http://localhost"
TIMEOUT = 600.0  # seconds; only a deadlock takes as long


def random_adapter(seed: int, r: int = 2) -> Adapter:
    """An adapter of the tiny base that changes its answers."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        f"model.layers.{layer}.self_attn.{name}": (
            torch.randn(r, 64, generator=generator),
            torch.randn(64, r, generator=generator) / 8,
        )
        for layer in range(2)
        for name in ("q_proj", "o_proj")
    }
    return Adapter.of(LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj", "o_proj"]), pairs)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that another thread makes true."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


class StepGate:
    """Holds an engine's steps back until a test allows them."""

    def __init__(self, engine: Engine) -> None:
        self._allowed = 0.0
        self._changed = threading.Condition()
        run = engine._runner.run

        def gated(*arguments: Any) -> Any:
            self._pass()
            return run(*arguments)

        engine._runner.run = gated

    def allow(self, steps: float) -> None:
        """Let this many more steps run."""
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()

    def open(self) -> None:
        """Let all steps run from now on."""
        self.allow(float("inf"))

    def _pass(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._allowed > 0, TIMEOUT)
            self._allowed -= 1


@pytest.fixture
def base(tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    return Base(tiny, tiny_tokenizer, "tiny", "org/tiny", fingerprint(tiny))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """poet in two versions, pirate, and team-a."""
    store = AdapterStore(tmp_path / "store")
    for seed, name in enumerate(("poet", "poet", "pirate", "team-a")):
        store.publish(name, random_adapter(seed, r=2 + seed))
    return store


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny")


@pytest.fixture
def engine(base: Base, store: AdapterStore, metrics: Metrics) -> Iterator[Engine]:
    with Engine(base, store, EngineConfig(), observer=metrics) as engine:
        yield engine


@pytest.fixture
def server(engine: Engine, metrics: Metrics) -> "LocalServer":
    return LocalServer(engine, metrics)


@dataclass
class LocalServer:
    """An application in this process, and the clients that talk to it."""

    engine: Engine
    metrics: Metrics
    options: dict[str, Any] = field(default_factory=dict)

    def configured(self, **options: Any) -> "LocalServer":
        """The same engine behind an application with these keys or this config."""
        return LocalServer(self.engine, self.metrics, options)

    def run(self, test: Callable[[httpx.AsyncClient], Awaitable[T]], key: str = "") -> T:
        """Await `test` with a client of a fresh application, and check that it leaves no request behind."""

        async def main() -> T:
            application = app(self.engine, self.metrics, **self.options)
            headers = {"authorization": f"Bearer {key}"} if key else {}
            transport = httpx.ASGITransport(application, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=URL, headers=headers) as client:
                result = await test(client)
            assert not application.state.server.live
            return result

        return asyncio.run(main())

    @contextmanager
    def listening(self) -> Iterator[tuple[str, ServerState]]:
        """Serve on a socket of this machine; gives its URL and the application's state."""
        application = app(self.engine, self.metrics, **self.options)
        with listen("127.0.0.1", 0, has_keys=False) as sock:
            server = Server(application, sock)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield url_of(sock), application.state.server
            finally:
                server.should_exit = True
                thread.join(TIMEOUT)
            assert not thread.is_alive()
            assert not application.state.server.live

    def request(self, path: str, body: Any = None, *, key: str = "") -> httpx.Response:
        """Send one request: a POST if there is a body."""
        return self.run(lambda client: client.request("GET" if body is None else "POST", path, json=body), key)

    def events(self, path: str, body: Any) -> list[Any]:
        """Request a stream, and return the data of its events."""
        lines = [line for line in self.request(path, {**body, "stream": True}).text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.fixture
def training_server(server: LocalServer, tmp_path: Path, one_thread: None) -> Iterator[LocalServer]:
    """A server that trains."""
    with LiveTraining(server.engine, tmp_path / "live", LiveConfig(checkpoint_every=2)) as training:
        yield server.configured(training=training)
