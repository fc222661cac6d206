"""What clients reach: passes each request on to a replica, and its answer back as it comes."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from loradeck.api.errors import HttpError, error_info
from loradeck.api.responses import ErrorResponse, json_response
from loradeck.blend import parse_blend
from loradeck.errors import LoradeckError
from loradeck.scale.affinity import ONE
from loradeck.scale.replica import HttpRequest
from loradeck.scale.routers import known_replicas

EVENTS = b"text/event-stream"
STORE_HINT = "Publish it in the store, which all replicas read."


class _Model(msgspec.Struct):
    """The fields of a body that name an adapter."""

    model: str = ""
    lora_name: str = ""


class Ingress:
    """Finds out which adapter a request is for, and sends it to that adapter's replica."""

    def __init__(self, replicas: DeploymentHandle, base: str, max_body_bytes: int) -> None:
        self._replicas = replicas.options(method_name="respond", stream=True)
        self._base, self._max_body_bytes = base, max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        try:
            body = await self._body(request)
        except (HttpError, ClientDisconnect) as error:
            return _refusal(error)
        passed = HttpRequest(
            request.method, request.url.path, request.scope["query_string"], [*request.scope["headers"]],
            request.client and (request.client.host, request.client.port), body,
        )  # fmt: skip
        if (request.method, request.url.path) == ("GET", "/metrics"):
            return await self._metrics(passed)
        return await self._answer(passed, adapter_of(body, self._base))

    async def _body(self, request: Request) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self._max_body_bytes:
                hint = STORE_HINT if request.url.path == "/v1/adapters" else ""
                raise HttpError(413, f"The body is larger than {self._max_body_bytes:,} bytes.", hint=hint)
            parts.append(part)
        return b"".join(parts)

    async def _answer(self, request: HttpRequest, replica: str) -> Response:
        messages = self._replicas.options(multiplexed_model_id=replica).remote(request)
        try:
            start = await anext(messages)
        except (RayError, StopAsyncIteration):
            return _refusal(_lost())
        response = StreamingResponse(_parts(messages, is_stream=_type(start).startswith(EVENTS)), start["status"])
        response.raw_headers = [*start["headers"]]
        return response

    async def _metrics(self, request: HttpRequest) -> Response:
        """Return the metrics of all replicas, each with a label that names it."""
        answers = [await self._read(request, replica) for replica in known_replicas()]
        refused = next((answer for _, answer in answers if answer.status_code != 200), None)
        if refused is not None:
            return refused
        merged = merge({replica: bytes(answer.body).decode() for replica, answer in answers})
        return Response(merged, media_type=CONTENT_TYPE_LATEST)

    async def _read(self, request: HttpRequest, replica: str) -> tuple[str, Response]:
        response = await self._answer(request, ONE + replica)
        if not isinstance(response, StreamingResponse):
            return replica, response
        body = b"".join([part async for part in response.body_iterator])  # type: ignore[misc]
        whole = Response(body, response.status_code)
        whole.raw_headers = response.raw_headers
        return replica, whole


def adapter_of(body: bytes, base: str) -> str:
    """Return the name by which a request is sent to a replica: that of its first adapter, without a version; "" for the
    base."""
    try:
        fields = msgspec.json.decode(body, type=_Model)
        name = (fields.model or fields.lora_name).removeprefix(f"{base}:")
        return "" if name == base else next(iter(parse_blend(name)), ("", 0.0))[0].partition("@")[0]
    except (msgspec.MsgspecError, LoradeckError, ValueError, RecursionError):
        return ""  # the replica says what is wrong with it


def merge(texts: dict[str, str]) -> bytes:
    """Return the metrics of several replicas as one text, each sample with a label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    return generate_latest(_Families(families))  # type: ignore[arg-type]


class _Families:
    def __init__(self, families: dict[str, Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return [*self._families.values()]


async def _parts(messages: Any, *, is_stream: bool) -> AsyncIterator[bytes]:
    try:
        async for message in messages:
            yield message.get("body", b"")
    except RayError:
        if not is_stream:
            raise  # the connection closes before its answer is whole
        info, _ = error_info(_lost(), "")
        yield b"data: " + msgspec.json.encode(ErrorResponse(info)) + b"\n\n"
    finally:
        messages.cancel()


def _lost() -> HttpError:
    return HttpError(
        503, "The replica that was to answer has ended.", hint="Send the request again.", headers={"retry-after": "1"}
    )


def _refusal(error: Exception) -> Response:
    info, headers = error_info(error, "")
    return json_response(ErrorResponse(info), info.code, headers)


def _type(start: Message) -> bytes:
    return next((value for name, value in start["headers"] if name.lower() == b"content-type"), b"")
