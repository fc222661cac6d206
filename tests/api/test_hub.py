"""Adapters of the Hugging Face hub in requests: downloaded on demand, where the server allows their repository."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.hub_server import Hub
from tests.lora.test_hub import files_of, hub, pytestmark  # noqa: F401 (the fixture)

from loradeck import Adapter, AdapterStore, Base, LoraConfig
from loradeck.api.metrics import Metrics
from loradeck.lora import hub as hub_module
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.serve.hub_adapters import AT_ONCE

from .conftest import TIMEOUT, LocalServer, random_adapter

CHAT = "/v1/chat/completions"


@pytest.fixture
def hub_of_three(hub: Hub, tmp_path: Path) -> Hub:  # noqa: F811
    for seed, name in enumerate(("owner/poet", "owner/pirate", "other/poet")):
        folder = random_adapter(seed).save(tmp_path / "saved" / name)
        hub.add(name, files_of(folder))
    return hub


@pytest.fixture
def server(base: Base, store: AdapterStore, metrics: Metrics, hub_of_three: Hub) -> Iterator[LocalServer]:
    with Engine(base, store, EngineConfig(hub=("owner/*",), hub_bytes=100_000), observer=metrics) as engine:
        yield LocalServer(engine, metrics)


def request(model: str) -> dict[str, object]:
    message = {"role": "user", "content": "hi"}
    return {"model": model, "messages": [message], "temperature": 0, "max_tokens": 8}


def answer(server: LocalServer, model: str) -> str:
    response = server.request(CHAT, request(model))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_a_request_names_an_adapter_of_the_hub(server: LocalServer, hub_of_three: Hub, tmp_path: Path) -> None:
    store = server.engine.store
    assert store is not None
    for name in "poet", "pirate":
        store.publish(f"same-{name}", tmp_path / "saved" / "owner" / name)
    poet, pirate = (answer(server, f"same-{name}") for name in ("poet", "pirate"))
    assert poet != pirate
    commit = hub_of_three.repositories["owner/poet"].revisions["main"]
    assert answer(server, "owner/poet") == answer(server, f"owner/poet@{commit}") == poet
    assert answer(server, "owner/pirate") == answer(server, "tiny:owner/pirate") == pirate
    assert answer(server, "owner/poet*0.5+owner/pirate*0.5") == answer(server, "same-poet*0.5+same-pirate*0.5")
    models = {model["id"]: model for model in server.request("/v1/models").json()["data"]}
    assert models["owner/poet"]["root"] == f"owner/poet@{commit}"
    assert server.request("/v1/models/owner/poet").json()["adapter"]["sha256"] == store.find("same-poet").sha256()


def test_a_name_is_asked_for_once_in_a_while(server: LocalServer, hub_of_three: Hub) -> None:
    answer(server, "owner/poet")
    hub_of_three.asked.clear()
    for _ in range(3):
        answer(server, "owner/poet")
    assert hub_of_three.asked == []


def test_other_repositories_are_unknown_and_not_asked_for(server: LocalServer, hub_of_three: Hub) -> None:
    for name in "other/poet", "nobody/x", "owner/a/b":
        response = server.request(CHAT, request(name))
        assert response.status_code == 404, response.text
        assert response.json()["error"]["param"] == "model"
    assert hub_of_three.asked == []


def test_what_the_hub_does_not_give_is_one_clear_error(server: LocalServer, hub_of_three: Hub) -> None:
    hub_of_three.add("owner/model", {"config.json": b"{}"})
    hub_of_three.add("owner/large", {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(200_000)})
    for name, message in {
        "owner/none": "the hub has no adapter owner/none",
        "owner/model": "owner/model is a model, not an adapter",
        "owner/large": "owner/large has 200002 bytes, more than the limit of 100000",
        "owner/poet@v9": "owner/poet has no such revision",
    }.items():
        response = server.request(CHAT, request(name))
        assert 400 <= response.status_code < 500, response.text
        assert response.json()["error"]["message"].startswith(message)
    assert answer(server, "owner/poet")


def test_an_adapter_that_does_not_fit_is_named_and_not_listed(
    server: LocalServer, hub_of_three: Hub, tmp_path: Path
) -> None:
    pairs = {"model.layers.0.self_attn.q_proj": (torch.zeros(2, 32), torch.zeros(32, 2))}
    folder = Adapter.of(LoraConfig(r=2, target_modules=["q_proj"]), pairs).save(tmp_path / "narrow")
    repository = hub_of_three.add("owner/narrow", files_of(folder))
    response = server.request(CHAT, request("owner/narrow"))
    assert response.status_code == 422
    name = f"owner/narrow@{repository.revisions['main']}"
    assert response.json()["error"]["message"].startswith(f"{name} does not fit this base")
    loading = server.request("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "owner/narrow"})
    assert loading.status_code == 422
    for text in response.text, loading.text:
        assert name in text
        assert str(tmp_path) not in text
    assert answer(server, "owner/poet")
    models = [model["id"] for model in server.request("/v1/models").json()["data"]]
    assert "owner/poet" in models
    assert "owner/narrow" not in models


def test_steps_go_on_while_the_hub_is_slow(
    server: LocalServer, hub_of_three: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that wait for it are few: others of this kind are told to come again."""
    arrived, go_on = threading.Semaphore(0), threading.Event()
    download = hub_module.download

    def slow(*arguments: object, **settings: object) -> Path:
        arrived.release()
        assert go_on.wait(TIMEOUT)
        return download(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(hub_module, "download", slow)

    async def main(client: object) -> None:
        waiting = [asyncio.create_task(client.post(CHAT, json=request("owner/poet"))) for _ in range(AT_ONCE)]  # type: ignore[attr-defined]
        for _ in range(AT_ONCE):
            assert await asyncio.to_thread(arrived.acquire, timeout=TIMEOUT)
        assert (await client.post(CHAT, json=request("poet"))).status_code == 200  # type: ignore[attr-defined]
        assert (await client.post(CHAT, json=request("owner/pirate"))).status_code == 429  # type: ignore[attr-defined]
        go_on.set()
        assert {(await task).status_code for task in waiting} == {200}

    server.run(main)


def test_a_key_may_use_only_its_adapters(server: LocalServer, tmp_path: Path) -> None:
    from hashlib import sha256

    from loradeck.api.auth import ApiKey, ApiKeys

    key = ApiKey("one", sha256(b"secret").hexdigest(), adapters=("owner/poet",))
    limited = server.configured(keys=ApiKeys([key]))
    assert limited.request(CHAT, request("owner/poet"), key="secret").status_code == 200
    assert limited.request(CHAT, request("owner/pirate"), key="secret").status_code == 403


def test_a_hub_adapter_can_be_published_under_a_name_of_the_store(server: LocalServer) -> None:
    body = {"lora_name": "borrowed", "lora_path": "owner/poet"}
    assert server.request("/v1/load_lora_adapter", body).status_code == 200
    assert answer(server, "borrowed") == answer(server, "owner/poet")
