"""Errors: statuses, bodies in vLLM's shape, headers; what keys may do, and what web pages may."""

import hashlib
from typing import Any

import pytest

from loradeck import AdapterStore
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.config import ServerConfig

from .conftest import LocalServer

pytestmark = pytest.mark.slow

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REQUEST: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = ApiKeys([ApiKey("alice", sha("ka"), ("poet", "team-*")), ApiKey("root", sha("kr"), control=True)])


@pytest.mark.parametrize(
    "model", ["nobody", "poet@9", "tiny:nobody", "poet*0.5+nobody*0.5", "../poet", "poet@x", "é", "gpt-4o"]
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [True, False])
def test_an_unknown_adapter_is_404_and_never_the_base(server: LocalServer, model: str, path: str, stream: bool) -> None:
    answer = server.request(path, {**REQUEST, "prompt": "a", "model": model, "stream": stream})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("NotFoundError", 404, "model")
    assert str(server.engine.store.folder) not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {**REQUEST, "model": "poet*"}, 400, "model"),
        (CHAT, {**REQUEST, "messages": []}, 400, "messages"),
        (CHAT, {**REQUEST, "messages": [{"role": "user", "content": "x" * 300}]}, 400, "prompt"),
        (CHAT, {**REQUEST, "logit_bias": {"999": 1}}, 400, None),
        (CHAT, {**REQUEST, "tools": [{"type": "function"}]}, 400, "tools"),
        (TEXT, {"prompt": []}, 400, "prompt"),
        (TEXT, {}, 400, "prompt"),
        (TEXT, {"prompt": ""}, 400, "prompt"),
        (TEXT, {"prompt": ["a", ""]}, 400, "prompt"),
        (TEXT, {"prompt": [[]]}, 400, "prompt"),
        (TEXT, {"prompt": [1, "a"]}, 400, "prompt"),
        (TEXT, {"prompt": [9999]}, 400, "prompt"),
        (TEXT, {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/tokenize", {}, 400, "prompt"),
        ("/detokenize", {"tokens": [9999]}, 400, "tokens"),
        ("/lora-adapters", [{"id": 77, "scale": 1}], 404, "lora"),
        ("/nowhere", {}, 404, None),
        ("/v1/models", {}, 405, None),
    ],
)
def test_errors_have_vllms_shape(server: LocalServer, path: str, body: Any, status: int, param: str | None) -> None:
    answer = server.request(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (status, param)


def test_a_405_lists_the_allowed_methods(server: LocalServer) -> None:
    assert "GET" in server.request("/v1/models", {}).headers["allow"]


def test_a_damaged_adapter_is_a_422(server: LocalServer, store: AdapterStore) -> None:
    file = next((store.folder / "pirate@1").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    for stream in (True, False):
        answer = server.request(CHAT, {**REQUEST, "model": "pirate", "stream": stream})
        assert answer.status_code == 422
        assert answer.json()["error"]["type"] == "UnprocessableEntityError"
        assert str(store.folder) not in answer.text
    assert server.request(CHAT, {**REQUEST, "model": "poet"}).status_code == 200


def test_limits(server: LocalServer) -> None:
    small = server.configured(config=ServerConfig(max_body_bytes=200, max_prompt=3, max_choices=2))
    assert small.request(TEXT, {"prompt": "x" * 200}).status_code == 413
    assert small.request(TEXT, {"prompt": "abcd"}).json()["error"]["param"] == "prompt"
    assert small.request(TEXT, {"prompt": ["a", "b"], "n": 2}).json()["error"]["param"] == "n"
    assert small.request(TEXT, {"prompt": ["a", "b"], "max_tokens": 1}).status_code == 200


def test_request_ids_are_sent_back(server: LocalServer) -> None:
    async def test(client: Any) -> list[str]:
        success = await client.get("/health", headers={"x-request-id": "first"})
        failure = await client.get("/nowhere", headers={"x-request-id": "second"})
        without = await client.get("/health")
        return [response.headers["x-request-id"] for response in (success, failure, without)]

    success, failure, without = server.run(test)
    assert (success, failure) == ("first", "second")
    assert len(without) == 32


@pytest.mark.parametrize(
    ("sent", "used"),
    [
        (b"a\x1b[31mb", "a[31mb"),
        (b"a b\tc", "abc"),
        (b"id=1 status='200'", "id1status200"),
        (b"x" * 4000, "x" * 128),
        ("é".encode() + b"\xff-1", "-1"),
    ],
)
def test_request_ids_have_no_more_than_an_id_needs(server: LocalServer, sent: bytes, used: str) -> None:
    async def test(client: Any) -> str:
        return str((await client.get("/health", headers={b"x-request-id": sent})).headers["x-request-id"])

    assert server.run(test) == used


def test_a_bug_is_a_500_and_its_traceback_is_in_the_log(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(client: Any) -> Any:
        return await client.post(CHAT, json=REQUEST, headers={"x-request-id": "mine"})

    with monkeypatch.context() as patched:
        patched.setattr(server.engine, "submit", lambda *_, **__: 1 // 0)
        response = server.run(test)
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["error"]["type"] == "InternalServerError"
    assert "division" not in response.text
    bug, line = caplog.records[-2:]
    assert bug.exc_info[0] is ZeroDivisionError
    assert (bug.args["id"], line.args["id"], line.args["status"]) == ("mine", "mine", 500)
    assert line.args["error"].startswith("ZeroDivisionError")


# ---- keys


def test_all_but_the_public_paths_need_a_key(server: LocalServer) -> None:
    guarded = server.configured(keys=KEYS)
    for path in ("/health", "/version", "/openapi.json"):
        assert guarded.request(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/lora-adapters", "/v1/models/poet", "/nowhere"):
        answer = guarded.request(path)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "AuthenticationError"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.request(CHAT, REQUEST, key="wrong").status_code == 401


def test_a_key_may_use_only_its_adapters(server: LocalServer) -> None:
    guarded = server.configured(keys=KEYS)

    def status(model: str, key: str = "ka", **fields: Any) -> int:
        return guarded.request(CHAT, {**REQUEST, "model": model, **fields}, key=key).status_code

    assert [status(name) for name in ("", "poet", "poet@1", "tiny:team-a")] == [200] * 4
    assert [status(name) for name in ("pirate", "nobody", "pirate@1", "poet*0.5+pirate*0.5", "tiny:pirate")] == [
        403
    ] * 5
    assert status("", adapter_id="pirate") == 403
    assert status("", lora=[{"id": 0, "scale": 1}]) == 403
    assert status("pirate", "kr") == 200
    assert [model["id"] for model in guarded.request("/v1/models", key="ka").json()["data"]] == [
        "tiny",
        "poet",
        "team-a",
    ]
    assert guarded.request("/v1/models/pirate", key="ka").status_code == 403
    assert [adapter["path"] for adapter in guarded.request("/lora-adapters", key="ka").json()] == ["poet", "team-a"]
    assert guarded.request("/lora-adapters", [{"id": 0, "scale": 1}], key="kr").status_code == 200


def test_control_needs_a_key_with_control(server: LocalServer) -> None:
    guarded = server.configured(keys=KEYS)
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = guarded.request(path, {"lora_name": "poet"}, key="ka")
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "PermissionDeniedError")
    assert guarded.request("/lora-adapters", [], key="ka").status_code == 403
    assert guarded.request("/metrics", key="ka").status_code == 403
    assert guarded.request("/metrics", key="kr").status_code == 200


# ---- web pages


def test_web_pages_need_an_allowed_origin(server: LocalServer) -> None:
    async def preflight(client: Any) -> Any:
        headers = {"origin": "https://page.example", "access-control-request-method": "POST"}
        return await client.options(CHAT, headers=headers)

    async def rebound(client: Any) -> Any:
        return await client.get("/v1/models", headers={"host": "evil.example"})

    async def without_preflight(client: Any) -> Any:
        return await client.post(
            "/v1/unload_lora_adapter", content='{"lora_name": "poet"}', headers={"content-type": "text/plain"}
        )

    assert "access-control-allow-origin" not in server.run(preflight).headers
    allowed = server.configured(keys=KEYS, config=ServerConfig(origins=("https://page.example",)))
    assert allowed.run(preflight).headers["access-control-allow-origin"] == "https://page.example"
    assert server.run(rebound).status_code == 400
    assert server.configured(keys=KEYS).run(rebound, "kr").status_code == 200
    assert server.run(without_preflight).status_code == 415
