"""Errors: statuses, bodies in vLLM's shape, headers; what keys may do, and what web pages may."""

import asyncio
import hashlib
import socket
from typing import Any

import httpx
import openai
import pytest
import torch

from loradeck import AdapterStore, Base
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.config import ServerConfig
from loradeck.api.metrics import Metrics
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

from .conftest import TIMEOUT, LocalServer, random_adapter

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
        (CHAT, {**REQUEST, "logit_bias": {"999": 1}}, 400, "logit_bias"),
        (TEXT, {"prompt": "a", "stop_token_ids": [1, 999]}, 400, "stop_token_ids"),
        (CHAT, {**REQUEST, "model": "poet*1e30"}, 400, "model"),
        (CHAT, {**REQUEST, "model": "poet*-1e39+pirate"}, 400, "model"),
        (CHAT, {**REQUEST, "adapter_id": "poet*1e39"}, 400, "adapter_id"),
        (CHAT, {**REQUEST, "lora": [{"id": 0, "scale": 1e39}]}, 400, "lora[0].scale"),
        ("/lora-adapters", [{"id": 0, "scale": 1e39}], 400, "[0].scale"),
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
    answer = server.request("/v1/models", {})
    assert "GET" in answer.headers["allow"]
    assert "GET" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "Did you mean /v1/chat/completions?"),
        ("/v1/v1/chat/completions", "Did you mean /v1/chat/completions?"),
        ("/v1/chat/completion", "Did you mean /v1/chat/completions?"),
        ("/v1/model", "Did you mean /v1/models?"),
        ("/tokenise", "Did you mean /tokenize?"),
        ("/api/generate", "GET /openapi.json lists the routes."),
        ("/" + "v1/chat/" * 500, "GET /openapi.json lists the routes."),
    ],
)
def test_an_unknown_route_names_the_close_one(server: LocalServer, path: str, hint: str) -> None:
    for body in ({}, None):
        answer = server.request(path, body)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == f"There is no route {path[:128]}.\n{hint}"


def test_an_unknown_adapter_names_the_close_ones_that_the_key_may_use(server: LocalServer) -> None:
    guarded = server.configured(keys=KEYS)

    def message(model: str, key: str) -> str:
        answer = guarded.request(CHAT, {**REQUEST, "model": model}, key=key)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
        return str(answer.json()["error"]["message"])

    assert message("pirat", "kr").endswith("Did you mean pirate?")
    assert message("tiny:poet*0.5+pirat*0.5", "kr").endswith("Did you mean pirate?")
    assert message("team-aa", "ka").endswith("Did you mean team-a?")
    assert message("poet@9", "kr").endswith("GET /v1/models lists the models.")
    assert message("team-pirate", "ka").endswith("Did you mean team-a?")  # no word of pirate
    assert str(server.engine.store.folder) not in message("pirat", "kr")


# ---- failures that a client must not repeat


@pytest.mark.parametrize("stream", [True, False])
def test_logits_that_are_nan_are_a_422_and_no_neighbours_concern(
    server: LocalServer, store: AdapterStore, stream: bool
) -> None:
    huge = random_adapter(7)
    with torch.no_grad():
        for parameter in huge.parameters():
            parameter *= 1e30
    store.publish("huge", huge)
    body = {**REQUEST, "max_tokens": 8, "temperature": 0}
    alone = server.request(CHAT, {**body, "model": "poet"}).json()["choices"][0]["message"]

    async def test(client: httpx.AsyncClient) -> list[httpx.Response]:
        bodies = [{**body, "model": model} for model in ("poet", "poet")]
        bodies.insert(1, {**body, "model": "huge", "stream": stream})
        return await asyncio.gather(*(client.post(CHAT, json=each) for each in bodies))

    first, failed, last = server.run(test)
    assert failed.status_code == 422
    assert "NaN or Inf" in failed.json()["error"]["message"]
    assert [answer.json()["choices"][0]["message"] for answer in (first, last)] == [alone] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_late_request_is_a_504_that_openais_client_sends_once(
    base: Base, store: AdapterStore, metrics: Metrics, stream: bool
) -> None:
    with Engine(base, store, EngineConfig(timeout=1e-9), observer=metrics) as engine:
        requests: list[httpx.Request] = []

        async def count(request: httpx.Request) -> None:
            requests.append(request)

        async def test(client: httpx.AsyncClient) -> None:
            client.event_hooks["request"].append(count)
            tool = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", http_client=client)
            with pytest.raises(openai.InternalServerError, match="not done within") as caught:
                await tool.chat.completions.create(model="poet", messages=REQUEST["messages"], stream=stream)
            assert caught.value.status_code == 504

        LocalServer(engine, metrics).run(test)
    assert len(requests) == 1


# ---- hosts


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]", 200),
        ("[::1]:8000", 200),
        ("docker.internal:8000", 200),
        ("a.b.test", 200),
        ("host.docker.internal", 400),
        ("b.test", 400),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("[::1].evil.example", 400),
        ("", 400),
    ],
)
def test_the_hosts_that_are_served_without_keys(server: LocalServer, host: str, status: int) -> None:
    configured = server.configured(config=ServerConfig(hosts=("docker.internal", "*.b.test")))
    answer = configured.run(lambda client: client.get("/health", headers={"host": host}))
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["type"] == "BadRequestError"
        assert "--hosts" in answer.json()["error"]["message"]


def exchange(url: str, request: str) -> tuple[bytes, bytes]:
    """Send raw bytes; return the head and the body of the answer, up to where the server closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode())
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def test_raw_requests(server: LocalServer) -> None:
    post = f"POST {CHAT} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nConnection: close\n"
    chunked = f"{post}Transfer-Encoding: chunked\n"
    body = "2\n{}\n0\n\n"
    with server.listening() as (url, _):
        head, text = exchange(url, "GET /v1/models HTTP/1.0\n\n")  # no Host header
        assert head.startswith(b"HTTP/1.1 200")
        assert b"poet" in text
        head, text = exchange(url, "GET /v1/models HTTP/1.0\nHost: evil.example\n\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert b"--hosts" in text
        head, _ = exchange(url, f"{chunked}\n{body}")
        assert head.startswith(b"HTTP/1.1 400")  # for {}
        head, text = exchange(url, f"{chunked.replace('Connection: close', 'X: y')}Content-Length: 2\n\n{body}")
        assert head.startswith(b"HTTP/1.1 400")
        assert b"content-length or a transfer-encoding" in text


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
