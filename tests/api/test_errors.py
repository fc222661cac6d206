"""What is refused, and how: statuses, bodies in vLLM's shape, headers; keys and what they may do."""

import hashlib
from typing import Any

import pytest

from loradeck import AdapterStore
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.config import ServerConfig

from .conftest import Serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SAY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = ApiKeys([ApiKey("alice", sha("ka"), ("poet", "team-*")), ApiKey("root", sha("kr"), control=True)])


@pytest.mark.parametrize(
    "model", ["nobody", "poet@9", "tiny:nobody", "poet*0.5+nobody*0.5", "../poet", "poet@x", "é", "gpt-4o"]
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [True, False])
def test_an_unknown_adapter_is_404_and_never_the_base(serve: Serve, model: str, path: str, stream: bool) -> None:
    answer = serve.ask(path, {**SAY, "prompt": "a", "model": model, "stream": stream})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("NotFoundError", 404, "model")
    assert str(serve.engine.store.folder) not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {**SAY, "model": "poet*"}, 400, "model"),
        (CHAT, {**SAY, "messages": []}, 400, "messages"),
        (CHAT, {**SAY, "messages": [{"role": "user", "content": "x" * 300}]}, 400, "prompt"),
        (CHAT, {**SAY, "logit_bias": {"999": 1}}, 400, None),
        (CHAT, {**SAY, "tools": [{"type": "function"}]}, 400, "tools"),
        (TEXT, {"prompt": []}, 400, "prompt"),
        (TEXT, {"prompt": ""}, 400, None),
        (TEXT, {"prompt": [[]]}, 400, None),
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
def test_errors_have_vllms_shape(serve: Serve, path: str, body: Any, status: int, param: str | None) -> None:
    answer = serve.ask(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (status, param)


def test_a_method_that_is_not_allowed_says_which_are(serve: Serve) -> None:
    assert "GET" in serve.ask("/v1/models", {}).headers["allow"]


def test_an_adapter_that_cannot_be_used_says_why(serve: Serve, store: AdapterStore) -> None:
    file = next((store.folder / "pirate@1").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    for stream in (True, False):
        answer = serve.ask(CHAT, {**SAY, "model": "pirate", "stream": stream})
        assert answer.status_code == 422
        assert answer.json()["error"]["type"] == "UnprocessableEntityError"
        assert str(store.folder) not in answer.text
    assert serve.ask(CHAT, {**SAY, "model": "poet"}).status_code == 200


def test_limits(serve: Serve) -> None:
    small = serve(config=ServerConfig(max_body_bytes=200, max_prompt=3, max_choices=2))
    assert small.ask(TEXT, {"prompt": "x" * 200}).status_code == 413
    assert small.ask(TEXT, {"prompt": "abcd"}).json()["error"]["param"] == "prompt"
    assert small.ask(TEXT, {"prompt": ["a", "b"], "n": 2}).json()["error"]["param"] == "n"
    assert small.ask(TEXT, {"prompt": ["a", "b"], "max_tokens": 1}).status_code == 200


def test_request_ids_come_back(serve: Serve) -> None:
    async def test(client: Any) -> list[str]:
        own = await client.get("/health", headers={"x-request-id": "mine"})
        lost = await client.get("/nowhere", headers={"x-request-id": "lost"})
        return [
            own.headers["x-request-id"],
            lost.headers["x-request-id"],
            (await client.get("/health")).headers["x-request-id"],
        ]

    own, lost, made = serve.run(test)
    assert (own, lost) == ("mine", "lost")
    assert len(made) == 32


# ---- keys


def test_a_key_opens_what_is_not_for_all(serve: Serve) -> None:
    guarded = serve(keys=KEYS)
    for path in ("/health", "/version", "/openapi.json"):
        assert guarded.ask(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/lora-adapters", "/v1/models/poet", "/nowhere"):
        answer = guarded.ask(path)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "AuthenticationError"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.ask(CHAT, SAY, key="wrong").status_code == 401


def test_a_key_uses_its_adapters_only(serve: Serve) -> None:
    guarded = serve(keys=KEYS)

    def status(model: str, key: str = "ka", **fields: Any) -> int:
        return guarded.ask(CHAT, {**SAY, "model": model, **fields}, key=key).status_code

    assert [status(name) for name in ("", "poet", "poet@1", "tiny:team-a")] == [200] * 4
    assert [status(name) for name in ("pirate", "nobody", "pirate@1", "poet*0.5+pirate*0.5", "tiny:pirate")] == [
        403
    ] * 5
    assert status("", adapter_id="pirate") == 403
    assert status("", lora=[{"id": 0, "scale": 1}]) == 403
    assert status("pirate", "kr") == 200
    assert [model["id"] for model in guarded.ask("/v1/models", key="ka").json()["data"]] == ["tiny", "poet", "team-a"]
    assert guarded.ask("/v1/models/pirate", key="ka").status_code == 403
    assert [own["path"] for own in guarded.ask("/lora-adapters", key="ka").json()] == ["poet", "team-a"]
    assert guarded.ask("/lora-adapters", [{"id": 0, "scale": 1}], key="kr").status_code == 200


def test_control_needs_a_key_with_control(serve: Serve) -> None:
    guarded = serve(keys=KEYS)
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = guarded.ask(path, {"lora_name": "poet"}, key="ka")
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "PermissionDeniedError")
    assert guarded.ask("/lora-adapters", [], key="ka").status_code == 403
    assert guarded.ask("/metrics", key="ka").status_code == 403
    assert guarded.ask("/metrics", key="kr").status_code == 200


# ---- pages in browsers


def test_pages_get_in_only_where_they_are_let_in(serve: Serve) -> None:
    async def preflight(client: Any) -> Any:
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        return await client.options(CHAT, headers=asked)

    async def renamed(client: Any) -> Any:
        return await client.get("/v1/models", headers={"host": "evil.example"})

    async def sneaked(client: Any) -> Any:
        return await client.post(
            "/v1/unload_lora_adapter", content='{"lora_name": "poet"}', headers={"content-type": "text/plain"}
        )

    assert "access-control-allow-origin" not in serve.run(preflight).headers
    allowed = serve(keys=KEYS, config=ServerConfig(origins=("https://page.example",)))
    assert allowed.run(preflight).headers["access-control-allow-origin"] == "https://page.example"
    assert serve.run(renamed).status_code == 400
    assert serve(keys=KEYS).run(renamed, "kr").status_code == 200
    assert serve.run(sneaked).status_code == 415
