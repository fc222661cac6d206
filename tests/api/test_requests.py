"""Bodies as strangers send them: what passes, what is refused, and which field the refusal names."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from loradeck.api.errors import HttpError
from loradeck.api.requests import ChatCompletionRequest, CompletionRequest, read_body

SAY = {"messages": [{"role": "user", "content": "hi"}]}


def read(raw: bytes, kind: Any = ChatCompletionRequest, content: str = "application/json") -> Any:
    parts = [{"type": "http.request", "body": raw[:7], "more_body": True}, {"type": "http.request", "body": raw[7:]}]

    async def receive() -> Any:
        return parts.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", content.encode())]}
    return asyncio.run(read_body(Request(scope, receive), kind, 1000))


def refused(fields: dict[str, Any], **rest: Any) -> HttpError:
    with pytest.raises(HttpError) as caught:
        read(msgspec.json.encode({**SAY, **fields}), **rest)
    return caught.value


def test_fields_that_nobody_knows_pass() -> None:
    asked = read(msgspec.json.encode({**SAY, "store": True, "metadata": {"a": [1]}, "max_tokens": None}))
    assert asked.messages[0].content == "hi"
    assert asked.max_tokens is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"content": "hi"}]}, "messages[0]"),
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
def test_a_refusal_names_the_field(fields: dict[str, Any], param: str) -> None:
    error = refused(fields)
    assert error.status == 400
    assert error.param == param


def test_what_changes_nothing_is_no_reason_to_refuse() -> None:
    read(msgspec.json.encode({**SAY, "response_format": {"type": "text"}, "modalities": ["text"], "functions": None}))
    asked = {"prompt": "a", "best_of": 1, "suffix": ""}
    assert read(msgspec.json.encode(asked), CompletionRequest).prompt == "a"


def test_a_body_must_be_called_json() -> None:
    assert refused({}, content="text/plain").status == 415
    assert read(msgspec.json.encode(SAY), content="Application/JSON; charset=utf-8").messages


def test_a_long_body_is_refused() -> None:
    assert refused({"user": "x" * 1000}).status == 413


@pytest.mark.parametrize("raw", [b"", b"{", b"[" * 900 + b"]" * 90, b"\xff", b'{"messages": "\\ud800"}', b"NaN", b"[]"])
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        read(raw)
    assert caught.value.status == 400


@given(raw=st.binary(max_size=60) | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(lambda value: msgspec.json.encode({**SAY, "tools": value, "n": value})[:900]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_body_does_worse_than_400(raw: bytes) -> None:
    status = None
    try:
        read(raw)
    except HttpError as error:
        status = error.status
    assert status in (None, 400)
