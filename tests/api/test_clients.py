"""The server with openai's client, litellm and schemathesis; many clients at once, and clients that leave."""

import asyncio
import json
import os
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from loradeck.api.app import OPERATIONS, app
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.config import ServerConfig
from loradeck.api.server import is_loopback, listen, url_of
from loradeck.api.state import ServerState
from loradeck.api.streaming import PING, _EventSender
from loradeck.errors import ConfigError
from loradeck.live.records import JobRequest

from .conftest import TIMEOUT, URL, LocalServer, StepGate, until

pytestmark = pytest.mark.slow

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise its import uses the network

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions")
CHECKS = [
    schemathesis.checks.not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
    content_type_conformance,
]


@pytest.fixture
def url(server: LocalServer) -> Iterator[str]:
    with server.listening() as (address, _):
        yield address


# ---- openai and litellm


async def use(client: openai.AsyncOpenAI) -> None:
    """What people do with the client."""
    assert [model.id async for model in client.models.list()] == ["tiny", "pirate", "poet", "team-a"]
    assert (await client.models.retrieve("poet")).id == "poet"
    greedy: Any = {"model": "poet", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    completion = await client.chat.completions.create(**greedy, logprobs=True)
    text = completion.choices[0].message.content
    assert completion.usage is not None
    stream = await client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == completion.usage.total_tokens
    echoed = await client.completions.create(model="", prompt=["a", "b"], max_tokens=2, echo=True, logprobs=1)
    assert [choice.text[0] for choice in echoed.choices] == ["a", "b"]
    blend = {"adapter_id": "poet*0.5+pirate*0.5"}
    await client.chat.completions.create(model="", messages=MESSAGES, max_tokens=2, extra_body=blend)
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert unknown.value.body is not None
    with pytest.raises(openai.BadRequestError, match="response_format"):
        await client.chat.completions.create(model="", messages=MESSAGES, response_format={"type": "json_object"})


def test_openai_in_this_process(server: LocalServer) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        await use(openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", http_client=client, max_retries=0))

    server.run(test)


def test_openai_over_a_socket(url: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client:
            await use(client)

    asyncio.run(main())


@pytest.mark.parametrize("library", ["openai", "litellm"])
def test_clients_read_past_pings(server: LocalServer, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Each step waits for a ping of the stream."""
    gate = StepGate(server.engine)
    send = _EventSender.send

    async def send_and_step(sender: _EventSender, body: bytes, *, more: bool = True) -> None:
        await send(sender, body, more=more)
        gate.allow(body == PING)

    monkeypatch.setattr(_EventSender, "send", send_and_step)
    greedy: Any = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "stream": True}
    pinging = server.configured(config=ServerConfig(ping=0.002))
    with (
        pinging.listening() as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT) as client,
    ):
        chunks: Any
        if library == "openai":
            chunks = client.chat.completions.create(model="poet", **greedy)
        else:
            chunks = litellm_completion(client, model="openai/poet", **greedy)
        text = "".join([chunk.choices[0].delta.content or "" for chunk in chunks])
        gate.open()
        answer = client.chat.completions.create(model="poet", **{**greedy, "stream": False})
        assert text == answer.choices[0].message.content


def test_openai_with_a_wrong_key(server: LocalServer) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        stranger = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="wrong", http_client=client, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()

    server.configured(keys=ApiKeys([ApiKey("a", "0" * 64)])).run(test)


def litellm_completion(client: openai.OpenAI, **request: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, and those of its dependencies
        import litellm

        # litellm never closes what it opens itself: an event loop if there is none.
        with asyncio.Runner() as runner:
            asyncio.set_event_loop(runner.get_loop())
            return list(litellm.completion(client=client, **request))


def test_litellm(url: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, and those of its dependencies
        import litellm

        # litellm never closes what it opens itself: the client's socket, and an event loop if there is none.
        with (
            asyncio.Runner() as runner,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT) as client,
        ):
            asyncio.set_event_loop(runner.get_loop())
            request: Any = {"messages": MESSAGES, "client": client}
            greedy: Any = {**request, "model": "openai/poet", "temperature": 0, "max_tokens": 6}
            completion = litellm.completion(**greedy)
            chunks = list(litellm.completion(**greedy, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == completion.choices[0].message.content
            with pytest.raises(litellm.NotFoundError):
                litellm.completion(**request, model="openai/nobody")


# ---- schemathesis


def test_schemathesis_reads_streams(server: LocalServer) -> None:
    """It reads a stream as a sequence of events, not as one text."""
    headers = {"host": "localhost"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app(server.engine, server.metrics), headers=headers)
    for path, body in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        body = {**body, "max_tokens": 2, "stream": True}
        case = schema[path]["POST"].Case(body=body, media_type="application/json")
        response = case.call(headers=headers)
        assert response.headers["content-type"][0].startswith("text/event-stream")
        case.validate_response(response, checks=CHECKS)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schemathesis_finds_no_fault(server: LocalServer, mode: GenerationMode) -> None:
    headers = {"host": "localhost"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app(server.engine, server.metrics), headers=headers)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    paths = {operation.route.path_format for operation in OPERATIONS}
    assert paths - {operation.path for operation in operations} == {"/openapi.json"}
    for operation in operations:

        @settings(max_examples=10, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and case.operation.path in GENERATION_PATHS:
                case.body |= {"max_tokens": 2, "max_completion_tokens": 2, "n": 1}  # for speed
            case.validate_response(case.call(headers=headers), checks=CHECKS)

        try:
            check()
        except Unsatisfiable:
            assert mode == GenerationMode.NEGATIVE  # an operation without parameters has no invalid ones


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schemathesis_finds_no_fault_in_training(training_server: LocalServer, mode: GenerationMode) -> None:
    """With a file and a job that are there, where a case needs one."""
    headers, training = {"host": "localhost"}, training_server.options["training"]
    application = app(training_server.engine, training_server.metrics, training=training)
    schema = schemathesis.openapi.from_asgi("/openapi.json", application, headers=headers)
    with training.uploads.upload("", "a.jsonl", "fine-tune") as upload:
        upload.write(b'{"text": "abc"}')
    file = upload.record.id
    job = training.create(JobRequest(model="tiny", training_file=file)).id
    training.cancel(job, "")  # so that its events end
    operations = [operation.ok() for operation in schema.get_all_operations()]
    of_training = [each for each in operations if each.path.startswith(("/v1/files", "/v1/fine_tuning"))]
    assert len(of_training) == 15
    for operation in of_training:

        @settings(max_examples=10, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
        def check(case: Any, known: bool) -> None:
            if known and "id" in case.path_parameters:
                case.path_parameters["id"] = file if "files" in case.operation.path else job
            if known and isinstance(case.body, dict) and "training_file" in case.body:
                case.body |= {"training_file": file, "model": "tiny"}
            case.validate_response(case.call(headers=headers), checks=CHECKS)

        try:
            check()
        except Unsatisfiable:
            assert mode == GenerationMode.NEGATIVE  # an operation without parameters has no invalid ones


# ---- many clients, and clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(server: LocalServer, stream: bool) -> None:
    gate = StepGate(server.engine)
    body = {"messages": MESSAGES, "max_tokens": 100, "ignore_eos": True, "stream": stream, "n": 4}

    async def main(url: str, state: ServerState) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
            if stream:
                gate.allow(1)
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    await anext(response.aiter_lines())
            else:
                request = asyncio.create_task(client.post("/v1/chat/completions", json=body))
                await until(lambda: len(state.live) == 4)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
            await until(lambda: not state.live)
            gate.open()
            aborted = b'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 4.0'
            await until(lambda: aborted in state.metrics.read())

    with server.listening() as (url, state):
        asyncio.run(main(url, state))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_closes_its_side_has_left(server: LocalServer, stream: bool) -> None:
    """The end of its side is all that a server sees of a client that closes its socket while it waits."""
    gate = StepGate(server.engine)
    body = json.dumps({"messages": MESSAGES, "max_tokens": 100, "ignore_eos": True, "stream": stream})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def main(url: str, state: ServerState) -> None:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write((head + body).encode())
        await until(lambda: state.live)
        writer.write_eof()
        await until(lambda: not state.live)
        gate.open()
        assert b"data" not in await reader.read()
        writer.close()

    with server.listening() as (url, state):
        asyncio.run(main(url, state))


def test_many_clients_at_once(url: str) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
            models = ["", "poet", "pirate", "team-a", "poet*0.5+pirate*0.5"] * 4
            bodies = [{"model": model, "messages": MESSAGES, "max_tokens": 5, "temperature": 0} for model in models]
            responses = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
            texts = [response.json()["choices"][0]["message"]["content"] for response in responses]
            assert texts[:5] * 4 == texts

    asyncio.run(main())


# ---- the socket


def test_without_keys_only_this_machine_can_reach_the_server() -> None:
    with pytest.raises(ConfigError, match=r"without API keys[\s\S]*a file of API keys"):
        listen("0.0.0.0", 0, has_keys=False)
    with listen("0.0.0.0", 0, has_keys=True) as sock:
        assert url_of(sock).startswith("http://localhost:")
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com")] == [False] * 4


def test_an_unusable_address_is_refused() -> None:
    with listen("127.0.0.1", 0, has_keys=False) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use\n"):
            listen("127.0.0.1", port, has_keys=False)
    for host, port in (("127.0.0.1", 99999), ("no.such.host.invalid", 0)):
        with pytest.raises(ConfigError, match="cannot listen on"):
            listen(host, port, has_keys=True)
