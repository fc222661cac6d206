"""Versions of adapters, removing them, and blends that are saved as adapters."""

import asyncio
import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from loradeck import Adapter, AdapterStore, LoraConfig
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.lora.distance import compare
from loradeck.lora.manifest import read_folder

from .conftest import TIMEOUT, LocalServer, StepGate, random_adapter, until

pytestmark = pytest.mark.slow

CHAT, COMBINE = "/v1/chat/completions", "/v1/adapters/combine"
REQUEST: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 6}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


KEYS = ApiKeys(
    [
        ApiKey("operator", sha("ko"), ("poet", "team-*", "mine-*"), control=True, create=("mine-*", "team-*")),
        ApiKey("alice", sha("ka"), ("poet",)),
    ]
)


def delete(server: LocalServer, id: str, key: str = "") -> httpx.Response:
    return server.run(lambda client: client.delete(f"/v1/models/{id}"), key)


def error_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


def update(folder: Path, path: str) -> torch.Tensor:
    adapter = Adapter.load(folder)
    a, b = adapter.pair(path)
    return adapter.sites[path].scaling * b.double() @ a.double()


# ---- versions


def test_versions_are_listed_the_newest_first(server: LocalServer, store: AdapterStore) -> None:
    server.request(CHAT, {**REQUEST, "model": "poet@1"})
    listed = server.request("/v1/adapters/poet/versions").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["poet@2", "poet@1"]
    assert [card["adapter"]["loaded"] for card in listed["data"]] == [False, True]
    assert [card["adapter"]["sha256"] for card in listed["data"]] == [
        store.find("poet@2").sha256(),
        store.find("poet@1").sha256(),
    ]
    for name in ("nobody", "tiny", "poet@1", ".versions"):
        unknown = server.request(f"/v1/adapters/{name}/versions")
        assert unknown.status_code == 404
        assert "pirate" not in unknown.text


def test_versions_that_do_not_fit_the_base_are_left_out(server: LocalServer, store: AdapterStore) -> None:
    pairs = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 32), torch.ones(64, 2))}
    store.publish("poet", Adapter.of(LoraConfig(r=2, target_modules=["q_proj"]), pairs))
    random_adapter(9).save(store.folder / "poet")  # was never published
    listed = server.request("/v1/adapters/poet/versions").json()["data"]
    assert [card["id"] for card in listed] == ["poet@2", "poet@1", "poet@0"]


def test_versions_are_for_keys_that_may_use_the_name(server: LocalServer) -> None:
    server = server.configured(keys=KEYS)
    assert len(server.request("/v1/adapters/poet/versions", key="ka").json()["data"]) == 2
    for name in ("pirate", "nobody"):  # whether it exists or not
        refused = server.request(f"/v1/adapters/{name}/versions", key="ka")
        assert refused.status_code == 403
        assert error_of(refused) == f"This API key may not use the adapter '{name}'."


# ---- removing


def test_one_version_is_removed(server: LocalServer, store: AdapterStore) -> None:
    for version in (1, 2):
        server.request(CHAT, {**REQUEST, "model": f"poet@{version}"})
    removed = delete(server, "poet@2")
    assert removed.json() == {"id": "poet@2", "object": "model", "deleted": True}
    assert store.versions("poet") == [1]
    assert server.engine.adapter_cache.bank.names() == [store.find("poet@1").sha256()]
    assert server.request("/v1/models/poet").json()["root"] == "poet@1"
    assert delete(server, "poet@2").status_code == 404
    assert delete(server, "tiny:poet@latest").json()["id"] == "tiny:poet@latest"
    assert "poet" not in store.names()


def test_an_adapter_is_removed_with_all_versions(server: LocalServer, store: AdapterStore) -> None:
    for name in ("poet@1", "poet@2", "pirate"):
        server.request(CHAT, {**REQUEST, "model": name})
    assert delete(server, "poet").status_code == 200
    assert store.names() == ["pirate", "team-a"]
    assert server.engine.adapter_cache.bank.names() == [store.find("pirate").sha256()]
    assert [model["id"] for model in server.request("/v1/models").json()["data"]] == ["tiny", "pirate", "team-a"]
    assert server.request(CHAT, {**REQUEST, "model": "poet"}).status_code == 404
    assert store.publish("poet", random_adapter(9)).version == 3  # no number is used again


def test_openais_client_removes_models(server: LocalServer, store: AdapterStore) -> None:
    with (
        server.listening() as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client,
    ):
        removed = client.models.delete("poet@1")
        assert (removed.id, removed.object, removed.deleted) == ("poet@1", "model", True)
        assert store.versions("poet") == [2]
        with pytest.raises(openai.NotFoundError):
            client.models.delete("nobody")
        with pytest.raises(openai.BadRequestError, match="is the base"):
            client.models.delete("tiny")


def test_an_adapter_that_cannot_be_read_is_removed(server: LocalServer, store: AdapterStore) -> None:
    (store.find("poet@2").path / "adapter_model.safetensors").write_bytes(b"x")
    assert delete(server, "poet@2").status_code == 200
    assert store.versions("poet") == [1]


@pytest.mark.parametrize(
    ("id", "status"),
    [
        ("tiny", 400),
        ("org/tiny", 400),
        ("", 400),
        ("nobody", 404),
        ("poet@7", 404),
        ("poet*0.5", 404),
        ("poet+pirate", 404),
        ("poet@x", 404),
        ("owner/name", 404),
        ("a*b", 404),
        ("..%2Fpoet", 404),
        (".versions", 404),
    ],
)
def test_what_is_no_adapter_is_not_removed(server: LocalServer, store: AdapterStore, id: str, status: int) -> None:
    before = sorted(store.folder.rglob("*"))
    refused = delete(server, id)
    assert refused.status_code == status, refused.text
    assert sorted(store.folder.rglob("*")) == before
    assert "pirate" not in error_of(refused).replace("poet+pirate", "")


def test_a_running_request_finishes_with_the_adapter_that_is_removed(server: LocalServer, store: AdapterStore) -> None:
    request = {**REQUEST, "model": "poet", "ignore_eos": True}
    expected = server.request(CHAT, request).json()["choices"][0]["message"]["content"]
    gate = StepGate(server.engine)
    gate.allow(1)

    async def test(client: httpx.AsyncClient) -> str:
        answer = asyncio.create_task(client.post(CHAT, json=request))
        await until(lambda: any(resident.pins for resident in server.engine.adapter_cache.residents()))
        assert (await client.delete("/v1/models/poet")).status_code == 200
        assert "poet" not in store.names()
        assert (await client.post(CHAT, json=request)).status_code == 404
        gate.open()
        return str((await answer).json()["choices"][0]["message"]["content"])

    assert server.run(test) == expected
    assert server.engine.adapter_cache.bank.names() == []  # its memory is free


def test_the_scale_of_a_removed_adapter_is_forgotten(server: LocalServer) -> None:
    """Else each request that names no model would ask for it."""

    async def test(client: httpx.AsyncClient) -> list[int]:
        ids = {each["path"]: each["id"] for each in (await client.get("/lora-adapters")).json()}
        scales = [{"id": ids["poet"], "scale": 1.0}]
        statuses = [(await client.post("/lora-adapters", json=scales)).status_code]
        for id in ("poet@2", "poet"):
            statuses.append((await client.delete(f"/v1/models/{id}")).status_code)
            statuses.append((await client.post(CHAT, json=REQUEST)).status_code)
        return statuses

    assert server.run(test) == [200] * 5


def test_keys_that_may_remove(server: LocalServer, store: AdapterStore) -> None:
    """A key must have control, may use the adapter, and might create it."""
    server = server.configured(keys=KEYS)
    assert delete(server, "poet").status_code == 401
    assert delete(server, "poet", "ka").status_code == 403
    for id in ("poet", "pirate", "nobody"):
        refused = delete(server, id, "ko")
        assert refused.status_code == 403
        assert f"the adapter '{id}'" in error_of(refused)
    assert store.names() == ["pirate", "poet", "team-a"]
    assert delete(server, "team-a", "ko").status_code == 200
    assert delete(server, "team-b", "ko").status_code == 404


# ---- combining


def test_a_blend_becomes_an_adapter_with_its_very_update(server: LocalServer, store: AdapterStore) -> None:
    response = server.request(COMBINE, {"name": "mix", "weights": {"poet": 0.7, "pirate@1": -0.3}})
    assert response.status_code == 200, response.text
    card = response.json()
    assert (card["id"], card["parent"], card["adapter"]["rank"]) == ("mix@1", "tiny", 3 + 4)
    mix, poet, pirate = (store.find(name).path for name in ("mix", "poet", "pirate"))
    for path in read_folder(poet).sites:
        expected = 0.7 * update(poet, path) - 0.3 * update(pirate, path)
        torch.testing.assert_close(update(mix, path), expected, rtol=1e-5, atol=1e-6)
    assert read_folder(mix).origin.provenance["blend"] == "pirate@1*-0.3+poet@2*0.7" or (
        read_folder(mix).origin.provenance["blend"] == "poet@2*0.7+pirate@1*-0.3"
    )
    assert read_folder(mix).origin.provenance["base_fingerprint"] == server.engine.base.fingerprint
    answers = [
        server.request(CHAT, {**REQUEST, "model": model}).json()["choices"][0]["message"]["content"]
        for model in ("mix", "poet*0.7+pirate*-0.3")
    ]
    assert answers[0] == answers[1]
    assert server.request(COMBINE, {"name": "mix", "weights": {"poet": 1}}).json()["id"] == "mix@2"


def test_names_of_one_adapter_share_its_rank(server: LocalServer, store: AdapterStore) -> None:
    weights = {"poet": 0.5, "poet@2": 0.25, "tiny:poet": 0.25, "pirate": 0}
    card = server.request(COMBINE, {"name": "mix", "weights": weights}).json()
    assert card["adapter"]["rank"] == 3
    modules = compare(read_folder(store.find("mix").path), read_folder(store.find("poet").path))
    assert [module.distance for module in modules] == pytest.approx([0] * len(modules), abs=1e-6)


def test_the_rank_of_a_blend_can_be_bounded(server: LocalServer, store: AdapterStore) -> None:
    body = {"name": "mix", "weights": {"poet": 0.5, "pirate": 0.5}, "max_rank": 5}
    assert server.request(COMBINE, body).json()["adapter"]["rank"] == 5
    mix, poet, pirate = (store.find(name).path for name in ("mix", "poet", "pirate"))
    assert 0 < float(read_folder(mix).origin.provenance["rank_error"]) < 1
    for path in read_folder(poet).sites:
        u, s, v = torch.linalg.svd(0.5 * update(poet, path) + 0.5 * update(pirate, path), full_matrices=False)
        torch.testing.assert_close(update(mix, path), (u[:, :5] * s[:5]) @ v[:5], rtol=1e-4, atol=1e-5)
    exact = {"name": "mix", "weights": {"poet": 1}, "max_rank": 64}
    assert server.request(COMBINE, exact).json()["adapter"]["rank"] == 3  # no zeros are added


def test_a_blend_has_the_tokenizer_that_its_adapters_share(server: LocalServer, store: AdapterStore) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for name, text in (("one", template), ("two", template), ("other", template + "!")):
        folder = random_adapter(len(name), r=2).save(store.folder / name)
        (folder / "chat_template.jinja").write_text(text)
    for names, has in ((("one", "two"), True), (("one", "other"), False), (("one", "poet"), False)):
        response = server.request(COMBINE, {"name": "mix", "weights": dict.fromkeys(names, 0.5)})
        assert response.status_code == 200, response.text
        assert (store.find("mix").path / "chat_template.jinja").exists() == has


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"weights": {"poet": 1}}, 400, "name"),
        ({"name": "mix"}, 400, "weights"),
        ({"name": "mix", "weights": {}}, 400, "weights"),
        ({"name": "mix", "weights": {"poet": 0}}, 400, "weights"),
        ({"name": "mix", "weights": {"poet": 1, "poet@2": -1}}, 400, "weights"),
        ({"name": "mix", "weights": {"poet": 1e300}}, 400, None),
        ({"name": "mix", "weights": {"nobody": 1}}, 404, "model"),
        ({"name": "mix", "weights": {"poet@9": 1}}, 404, "model"),
        ({"name": "mix", "weights": {"tiny": 1}}, 400, "weights"),
        ({"name": "mix", "weights": {"poet*0.5": 1}}, 404, "weights"),
        ({"name": "mix", "weights": {"poet": 1}, "max_rank": 0}, 400, "max_rank"),
        ({"name": "a/b", "weights": {"poet": 1}}, 400, "name"),
        ({"name": "tiny", "weights": {"poet": 1}}, 400, "name"),
        ({"name": "mix", "weights": {f"a{number}": 1 for number in range(65)}}, 400, "weights"),
    ],
)
def test_a_blend_that_makes_no_sense_is_refused(
    server: LocalServer, store: AdapterStore, body: dict[str, Any], status: int, param: str | None
) -> None:
    before = sorted(store.folder.rglob("*"))
    refused = server.request(COMBINE, body)
    assert refused.status_code == status, refused.text
    assert param is None or refused.json()["error"]["param"] == param
    assert sorted(store.folder.rglob("*")) == before


def test_adapters_that_cannot_be_combined_are_refused(server: LocalServer, store: AdapterStore) -> None:
    head = server.engine.base.model.lm_head.weight.detach() + 1
    one = random_adapter(9)
    pairs = {path: one.pair(path) for path in one.sites}
    config = replace(one.config, modules_to_save=("lm_head",))
    full = Adapter.with_sites(config, one.sites, pairs, saved={"lm_head": {"weight": head}})
    store.publish("full", full)
    refused = server.request(COMBINE, {"name": "mix", "weights": {"poet": 0.5, "full": 0.5}})
    assert refused.status_code == 422, refused.text
    assert "cannot be combined" in error_of(refused)
    server.engine.adapter_cache.budget = store.find("poet").facts.nbytes
    refused = server.request(COMBINE, {"name": "mix", "weights": {"poet": 0.5, "pirate": 0.5}})
    assert (refused.status_code, "adapter_bytes" in error_of(refused)) == (400, True)
    assert "mix" not in store.names()


def test_a_store_that_cannot_be_changed_keeps_no_half_blend(server: LocalServer, store: AdapterStore) -> None:
    shutil.rmtree(store.folder / ".versions")
    (store.folder / ".versions").touch()
    before = sorted(store.folder.rglob("*"))
    refused = server.request(COMBINE, {"name": "mix", "weights": {"poet": 0.5, "pirate": 0.5}})
    assert refused.status_code == 422
    assert str(store.folder) not in refused.text
    assert sorted(store.folder.rglob("*")) == before
    assert server.engine.adapter_cache.bank.names() == []


def test_keys_that_may_combine(server: LocalServer, store: AdapterStore) -> None:
    server = server.configured(keys=KEYS)
    body = {"name": "mine-1", "weights": {"poet": 1}}
    assert server.request(COMBINE, body).status_code == 401
    assert server.request(COMBINE, body, key="ka").status_code == 403
    assert server.request(COMBINE, {**body, "name": "other"}, key="ko").status_code == 403
    for name in ("pirate", "nobody"):
        refused = server.request(COMBINE, {**body, "weights": {"poet": 0.5, name: 0.5}}, key="ko")
        assert (refused.status_code, error_of(refused)) == (403, f"This API key may not use the adapter '{name}'.")
    assert server.request(COMBINE, body, key="ko").status_code == 200
    assert store.names() == ["mine-1", "pirate", "poet", "team-a"]
