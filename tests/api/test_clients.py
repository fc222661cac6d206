"""Strangers' clients: openai in this process and over a socket, litellm, schemathesis; and clients that do not wait."""

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from loradeck.api.app import OPERATIONS, app
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.server import is_loopback, listen, url_of
from loradeck.errors import ConfigError

from .conftest import URL, Serve

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing it reaches for the network

SAY: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def url(serve: Serve) -> Iterator[str]:
    with serve.on_a_socket() as (address, _):
        yield address


async def talk(client: openai.AsyncOpenAI) -> None:
    """What people do with the client."""
    assert [model.id async for model in client.models.list()] == ["tiny", "pirate", "poet", "team-a"]
    assert (await client.models.retrieve("poet")).id == "poet"
    whole = await client.chat.completions.create(model="poet", messages=SAY, max_tokens=6, temperature=0, logprobs=True)
    text = whole.choices[0].message.content
    assert whole.usage is not None
    stream = await client.chat.completions.create(
        model="poet", messages=SAY, max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == whole.usage or chunks[-1].usage is not None
    both = await client.completions.create(model="", prompt=["a", "b"], max_tokens=2, echo=True, logprobs=1)
    assert [choice.text[0] for choice in both.choices] == ["a", "b"]
    blend = {"adapter_id": "poet*0.5+pirate*0.5"}
    await client.chat.completions.create(model="", messages=SAY, max_tokens=2, extra_body=blend)
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nobody", messages=SAY)
    assert missing.value.body is not None
    with pytest.raises(openai.BadRequestError, match="response_format"):
        await client.chat.completions.create(model="", messages=SAY, response_format={"type": "json_object"})


def test_openai_in_this_process(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        await talk(openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", http_client=client, max_retries=0))

    serve.run(test)


def test_openai_over_a_socket(url: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            await talk(client)

    asyncio.run(main())


def test_openai_without_a_key(serve: Serve) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        stranger = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="wrong", http_client=client, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()

    serve(keys=ApiKeys([ApiKey("a", "0" * 64)])).run(test)


def test_litellm(url: str) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, and of what it imports
        import litellm

        asked: Any = {"model": "openai/poet", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0}
        whole = litellm.completion(messages=SAY, max_tokens=6, **asked)
        chunks = list(litellm.completion(messages=SAY, max_tokens=6, stream=True, **asked))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(messages=SAY, **{**asked, "model": "openai/nobody"})


def test_schemathesis_reads_streams(serve: Serve) -> None:
    """It takes a stream for a sequence of events, and not for one text."""
    host = {"host": "localhost"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app(serve.engine, serve.metrics), headers=host)
    for path, own in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": SAY})):
        case = schema[path]["POST"].Case(body={**own, "max_tokens": 2, "stream": True}, media_type="application/json")
        response = case.call(headers=host)
        assert response.headers["content-type"][0].startswith("text/event-stream")
        case.validate_response(response, checks=CHECKS)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schemathesis_finds_nothing(serve: Serve, mode: GenerationMode) -> None:
    host = {"host": "localhost"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app(serve.engine, serve.metrics), headers=host)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.route.path_format for operation in OPERATIONS} - {own.path for own in operations} == {
        "/openapi.json"
    }
    for operation in operations:

        @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and case.operation.path in GENERATING:
                case.body |= {"max_tokens": 2, "max_completion_tokens": 2, "n": 1}  # what it takes is not its business
            case.validate_response(case.call(headers=host), checks=CHECKS)

        try:
            check()
        except Unsatisfiable:
            assert mode == GenerationMode.NEGATIVE  # it takes nothing that could be wrong


GENERATING = ("/v1/chat/completions", "/v1/completions")
CHECKS = [
    schemathesis.checks.not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
    content_type_conformance,
]


# ---- clients that do not wait


def quiet(serve: Serve) -> bool:
    """Whether the engine has nothing to do, soon."""
    until = time.monotonic() + 10
    while serve.engine.stats.running or serve.engine.stats.waiting:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(serve: Serve, url: str, stream: bool) -> None:
    body = {"messages": SAY, "max_tokens": 200, "ignore_eos": True, "stream": stream, "n": 4}
    with httpx.Client() as client:
        if stream:
            with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{url}/v1/chat/completions", json=body, timeout=0.05)
    assert quiet(serve)
    text = httpx.get(f"{url}/metrics").text
    assert 'finished_reason="abort"' in text


def test_many_clients_at_once(url: str) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            models = ["", "poet", "pirate", "team-a", "poet*0.5+pirate*0.5"] * 4
            asked = [{"model": m, "messages": SAY, "max_tokens": 5, "temperature": 0} for m in models]
            answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in asked))
            texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
            assert texts[:5] * 4 == texts

    asyncio.run(main())


# ---- the socket


def test_only_this_machine_can_reach_a_server_without_keys() -> None:
    with pytest.raises(ConfigError, match="without API keys"):
        listen("0.0.0.0", 0, has_keys=False)
    with listen("0.0.0.0", 0, has_keys=True) as address:
        assert url_of(address).startswith("http://localhost:")
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com")] == [False] * 4


def test_an_address_in_use_is_refused() -> None:
    with listen("127.0.0.1", 0, has_keys=False) as address, pytest.raises(ConfigError, match="cannot listen on"):
        listen("127.0.0.1", address.getsockname()[1], has_keys=False)
    for host, port in (("127.0.0.1", 99999), ("no.such.host.invalid", 0)):
        with pytest.raises(ConfigError, match="cannot listen on"):
            listen(host, port, has_keys=True)
