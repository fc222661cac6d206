"""Request bodies: what passes, what is refused, and which field the error names."""

import asyncio
import gzip
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from loradeck.api.app import OPERATIONS
from loradeck.api.coercion import coercion
from loradeck.api.errors import HttpError
from loradeck.api.requests import (
    MAGICS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoraScale,
    read_body,
)
from loradeck.api.training_requests import Method

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def read(raw: bytes, kind: Any = ChatCompletionRequest, content: str = "application/json", encoding: str = "") -> Any:
    parts = [{"type": "http.request", "body": raw[:7], "more_body": True}, {"type": "http.request", "body": raw[7:]}]

    async def receive() -> Any:
        return parts.pop(0)

    headers = [(b"content-type", content.encode())]
    if encoding:
        headers.append((b"content-encoding", encoding.encode()))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    return asyncio.run(read_body(Request(scope, receive), kind, 10_000))


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
        ({"stop": ["a"] * 257}, "stop"),
        ({"stop": "a" * 4097}, "stop"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_json": {}}, "guided_json"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "messages[0].tool_calls[0].type"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"max_tokens": 4.5}, "max_tokens"),
        ({"max_tokens": 1e30}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"lora": [{"id": "poet", "scale": 1}]}, "lora[0].id"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_an_error_names_the_field(fields: dict[str, Any], param: str) -> None:
    error = error_of(fields)
    assert error.status == 400
    assert error.param == param


def test_an_unsupported_field_may_have_a_harmless_value() -> None:
    read(msgspec.json.encode({**CHAT, "response_format": {"type": "text"}, "modalities": ["text"], "documents": None}))
    fields = {"prompt": "a", "best_of": 1, "suffix": ""}
    assert read(msgspec.json.encode(fields), CompletionRequest).prompt == "a"


@pytest.mark.parametrize(("name", "value"), [("best_of", 2), ("allowed_token_ids", [1])])
def test_fields_that_would_change_the_answer_are_refused_by_both_routes(name: str, value: object) -> None:
    for fields, kind in ((CHAT, ChatCompletionRequest), ({"prompt": "a"}, CompletionRequest)):
        with pytest.raises(HttpError, match=f"Unsupported: {name}="):
            read(msgspec.json.encode({**fields, name: value}), kind)


def test_a_byte_order_mark_is_no_part_of_the_body() -> None:
    assert read(b"\xef\xbb\xbf" + msgspec.json.encode(CHAT)).messages


def test_the_content_type_must_be_json() -> None:
    assert error_of({}, content="text/plain").status == 415
    assert read(msgspec.json.encode(CHAT), content="Application/JSON; charset=utf-8").messages


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate, gzip"])
def test_a_compressed_body_is_called_so(encoding: str) -> None:
    error = error_of({}, encoding=encoding)
    assert f"compressed with '{encoding}'" in error.message
    assert (error.status, error.headers) == (415, {"accept-encoding": "identity"})
    for encoding in ("identity", ""):
        read(msgspec.json.encode(CHAT), encoding=encoding)


def test_a_compressed_body_is_called_so_without_its_header() -> None:
    for name, raw in {"gzip": gzip.compress(b"{}"), "zstd": b"\x28\xb5\x2f\xfd\x04"}.items():
        with pytest.raises(HttpError, match=f"compressed with '{name}'"):
            read(raw)


# ---- numbers and nulls as other languages write them


def takes(info: msgspec.inspect.Type, kind: type) -> bool:
    if isinstance(info, msgspec.inspect.Metadata):
        return takes(info.type, kind)
    if isinstance(info, msgspec.inspect.UnionType):
        return any(takes(member, kind) for member in info.types)
    return isinstance(info, kind)


def fields_of(*kinds: type) -> list[tuple[type, msgspec.inspect.Field]]:
    """All fields of these structs and of those within them."""
    found: dict[type, tuple[msgspec.inspect.Field, ...]] = {}

    def visit(info: Any) -> None:
        if isinstance(info, msgspec.inspect.StructType) and info.cls not in found:
            found[info.cls] = info.fields
            for field in info.fields:
                visit(field.type)
        for part in ("item_type", "key_type", "value_type", "type", "types"):
            inner = getattr(info, part, ())
            for member in inner if isinstance(inner, tuple) else (inner,):
                visit(member)

    for kind in kinds:
        visit(msgspec.inspect.type_info(kind))
    return [(kind, field) for kind, fields in found.items() for field in fields]


REQUESTS = [each.body for each in OPERATIONS if each.body is not None and each.body_media == "application/json"]
FIELDS = fields_of(*REQUESTS)
MINIMUM: dict[str, Any] = {
    "messages": CHAT["messages"], "prompt": "a", "tokens": [], "lora_name": "a", "id": 1, "scale": 1, "role": "user",
    "type": "text", "text": "a", "name": "f", "function": {"name": "f"}, "examples": [{}],
    "model": "a", "training_file": "a", "weights": {"a": 1},
}  # fmt: skip


def convert(kind: Any, fields: dict[str, Any]) -> Any:
    required = {
        field.encode_name: "dpo" if kind is Method else MINIMUM[field.encode_name]
        for owner, field in FIELDS
        if owner is kind and field.required
    }
    return msgspec.convert(coercion(kind)({**required, **fields}), kind)


def test_all_request_types_are_looked_at() -> None:
    assert {kind.__name__ for kind, _ in FIELDS} >= {
        "ChatCompletionRequest", "ChatMessage", "TextPart", "ToolCall", "CompletionRequest", "StreamOptions", "LoraScale",
        "TokenizeRequest", "DetokenizeRequest", "LoadAdapterRequest", "UnloadAdapterRequest", "EvaluateRequest",
        "FineTuningJobRequest", "Method", "DpoHyperparameters",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", getattr(value, "name", ""))
)
def test_null_means_the_default(kind: type, field: msgspec.inspect.Field) -> None:
    if field.required:
        with pytest.raises(msgspec.ValidationError):
            convert(kind, {field.encode_name: None})
    else:
        assert convert(kind, {field.encode_name: None}) == convert(kind, {})


INTEGERS = [(kind, field) for kind, field in FIELDS if takes(field.type, msgspec.inspect.IntType)]


@pytest.mark.parametrize(
    ("kind", "field"), INTEGERS, ids=lambda value: getattr(value, "__name__", getattr(value, "name", ""))
)
@given(number=st.integers(2, 20))
def test_a_whole_float_is_an_integer(kind: type, field: msgspec.inspect.Field, number: int) -> None:
    name = field.encode_name
    value = getattr(convert(kind, {name: float(number)}), field.name)
    assert value == getattr(convert(kind, {name: number}), field.name)
    assert type(value) is int
    with pytest.raises(msgspec.ValidationError):
        convert(kind, {name: number + 0.5})
    with pytest.raises(msgspec.ValidationError):
        convert(kind, {name: str(number)})


def test_whole_floats_within_lists_and_nothing_else_changes() -> None:
    assert read(b'{"tokens": [1.0, 2]}', DetokenizeRequest).tokens == [1, 2]
    assert read(b'{"prompt": [[1.0], [2]]}', CompletionRequest).prompt == [[1], [2]]
    assert read(b'[{"id": 1.0, "scale": 2}]', list[LoraScale]) == [LoraScale(1, 2.0)]
    request = read(msgspec.json.encode({**CHAT, "tools": [{"a": 1.0}], "chat_template_kwargs": {"b": None, "c": 2.0}}))
    assert repr((request.tools, request.chat_template_kwargs)) == "([{'a': 1.0}], {'b': None, 'c': 2.0})"


def test_a_large_body_is_refused() -> None:
    assert error_of({"user": "x" * 10_000}).status == 413


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
    compressed = raw.startswith(tuple(MAGICS))  # the values that are tried are also taken from the code
    assert status in ((415,) if compressed else (None, 400))
