"""A tiny base, a store of tiny adapters, an engine on them, and its application in this process."""

import asyncio
import json
import threading
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
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

T = TypeVar("T")
URL = "http://localhost"


def adapter(seed: int, r: int = 2) -> Adapter:
    """An adapter of the tiny base that changes what it says."""
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


@pytest.fixture
def base(tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    return Base(tiny, tiny_tokenizer, "tiny", "org/tiny", fingerprint(tiny))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """poet in two versions, pirate, and team-a."""
    made = AdapterStore(tmp_path / "store")
    for seed, name in enumerate(("poet", "poet", "pirate", "team-a")):
        made.publish(name, adapter(seed, r=2 + seed))
    return made


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny")


@pytest.fixture
def engine(base: Base, store: AdapterStore, metrics: Metrics) -> Iterator[Engine]:
    with Engine(base, store, EngineConfig(), observer=metrics) as made:
        yield made


@pytest.fixture
def serve(engine: Engine, metrics: Metrics) -> "Serve":
    """Call it with keys or settings for an application, and `run` tests on it."""
    return Serve(engine, metrics)


@dataclass
class Serve:
    """An application in this process, and the clients that talk to it."""

    engine: Engine
    metrics: Metrics
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **options: Any) -> "Serve":
        return Serve(self.engine, self.metrics, options)

    def run(self, test: Callable[[httpx.AsyncClient], Awaitable[T]], key: str = "") -> T:
        """Await `test` with a client of a fresh application, and see that it leaves nothing on the engine."""

        async def main() -> T:
            made = app(self.engine, self.metrics, **self.options)
            headers = {"authorization": f"Bearer {key}"} if key else {}
            transport = httpx.ASGITransport(made, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=URL, headers=headers, timeout=30) as client:
                result = await test(client)
            assert not made.state.server.live
            return result

        return asyncio.run(main())

    @contextmanager
    def on_a_socket(self) -> Iterator[tuple[str, ServerState]]:
        """Serve on a socket of this machine; its URL, and the application's state."""
        made = app(self.engine, self.metrics, **self.options)
        address = listen("127.0.0.1", 0, has_keys=False)
        server = Server(made, address)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield url_of(address), made.state.server
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
            assert not made.state.server.live

    def ask(self, path: str, body: Any = None, *, key: str = "", method: str = "") -> httpx.Response:
        """Send one request."""
        return self.run(
            lambda client: client.request(method or ("GET" if body is None else "POST"), path, json=body), key
        )

    def events(self, path: str, body: Any) -> list[Any]:
        """Ask for a stream, and return its events."""
        lines = [line for line in self.ask(path, {**body, "stream": True}).text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]
