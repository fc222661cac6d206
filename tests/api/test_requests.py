"""Request bodies: what passes, what is refused, and which field the error names."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from loradeck.api.errors import HttpError
from loradeck.api.requests import ChatCompletionRequest, CompletionRequest, read_body

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def read(raw: bytes, kind: Any = ChatCompletionRequest, content: str = "application/json") -> Any:
    parts = [{"type": "http.request", "body": raw[:7], "more_body": True}, {"type": "http.request", "body": raw[7:]}]

    async def receive() -> Any:
        return parts.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", content.encode())]}
    return asyncio.run(read_body(Request(scope, receive), kind, 1000))


def error_of(fields: dict[str, Any], **rest: Any) -> HttpError:
    with pytest.raises(HttpError) as caught:
        read(msgspec.json.encode({**CHAT, **fields}), **rest)
    return caught.value


def test_unknown_fields_pass() -> None:
    request = read(msgspec.json.encode({**CHAT, "store": True, "metadata": {"a": [1]}, "max_tokens": None}))
    assert request.messages[0].content == "hi"
    assert request.max_tokens is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {}}, "guided_json"),
        ({"functions": [{}]}, "functions"),
        ({"lora": [{"id": "poet", "scale": 1}]}, "lora[0].id"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_an_error_names_the_field(fields: dict[str, Any], param: str) -> None:
    error = error_of(fields)
    assert error.status == 400
    assert error.param == param


def test_an_unsupported_field_may_have_a_harmless_value() -> None:
    read(msgspec.json.encode({**CHAT, "response_format": {"type": "text"}, "modalities": ["text"], "functions": None}))
    fields = {"prompt": "a", "best_of": 1, "suffix": ""}
    assert read(msgspec.json.encode(fields), CompletionRequest).prompt == "a"


def test_the_content_type_must_be_json() -> None:
    assert error_of({}, content="text/plain").status == 415
    assert read(msgspec.json.encode(CHAT), content="Application/JSON; charset=utf-8").messages


def test_a_large_body_is_refused() -> None:
    assert error_of({"user": "x" * 1000}).status == 413


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 900 + b"]" * 90, b"\xff", b'{"messages": "\\ud800"}', b"NaN", b"[]"])
def test_invalid_json_is_refused(raw: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        read(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize("raw", [b"", b'{"messages": ['])
def test_an_incomplete_body_is_called_so(raw: bytes) -> None:
    with pytest.raises(HttpError, match="The body is empty or incomplete JSON"):
        read(raw)


@pytest.mark.slow
@given(raw=st.binary(max_size=60) | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(lambda value: msgspec.json.encode({**CHAT, "tools": value, "n": value})[:900]))  # fmt: skip
@settings(max_examples=60)
def test_any_body_is_a_request_or_a_400(raw: bytes) -> None:
    status = None
    try:
        read(raw)
    except HttpError as error:
        status = error.status
    assert status in (None, 400)
