"""The routes as data, and the OpenAPI document that describes them."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from loradeck.api.errors import HttpError
from loradeck.api.origin import check_origin
from loradeck.api.requests import AdapterRequest
from loradeck.api.responses import JSON, ErrorResponse
from loradeck.api.state import state_of

SCHEMA_REF = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. The handler's docstring is its summary."""

    method: str
    path: str
    """As starlette writes it."""
    handler: Callable[[Request], Awaitable[ASGIApp]]
    body: Any = None
    """The type of the request's body, if it has one."""
    response: Any = None
    """The type of the response's JSON; None if it is plain text."""
    errors: tuple[int, ...] = ()
    """Statuses besides 200 and those that every operation has."""
    tasks: tuple[str, ...] = ()
    """The tasks of the bases that have this route; () for all."""
    query: type[msgspec.Struct] | None = None
    """The type of its parameters in the URL."""
    body_media: str = JSON
    """The media type of the request's body."""
    media: str = "text/plain"
    """The media type of a response without a type."""
    streams: bool = False
    """Whether the response may be server-sent events."""

    @property
    def route(self) -> Route:
        """The operation as starlette's router takes it."""
        return Route(self.path, self._handle, methods=[self.method])

    async def _handle(self, request: Request) -> ASGIApp:
        """Answer a request, or refuse it if the base was loaded for another task, or if a foreign web page sends it.

        Raises:
            HttpError: 400, 403.
        """
        state = state_of(request)
        if self.method != "GET" and (self.body is None or self.body_media != JSON):  # of others, `read_body` takes care
            check_origin(request, state.config)
        base = state.engine.base
        if self.tasks and base.task not in self.tasks:
            raise HttpError(
                400,
                f"{base.name} was loaded for the task {base.task}; {self.path} needs a server that was started with "
                f"--task {self.tasks[0]}.",
            )
        return await self.handler(request)


def openapi_document(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of these operations."""
    types = [kind for operation in operations for kind in (operation.body, operation.response) if kind is not None]
    (*schemas, error), components = msgspec.json.schema_components([*types, ErrorResponse], ref_template=SCHEMA_REF)
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        methods = paths.setdefault(operation.route.path_format, {})
        methods[operation.method.lower()] = _describe(operation, schema_of, error)
    return {
        "openapi": "3.1.0",
        "info": {"title": "loradeck", "version": version("loradeck")},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _describe(operation: Operation, schema_of: dict[Any, dict[str, Any]], error: dict[str, Any]) -> dict[str, Any]:
    if operation.response is None:
        content = {operation.media: {"schema": {"type": "string"}}}
    else:
        content = _json(schema_of[operation.response])
    statuses = {401, 403, 500, *operation.errors}
    if operation.body is not None:
        statuses |= {400, 413, 415}
    if isinstance(operation.body, type) and issubclass(operation.body, AdapterRequest):
        statuses |= {404, 422, 429, 503, 504}
    if operation.query is not None:
        statuses |= {400}
    if operation.streams:
        content["text/event-stream"] = dict[str, Any]()  # OpenAPI 3.1 has no schema for events
    description: dict[str, Any] = {
        "summary": operation.handler.__doc__,
        "operationId": operation.handler.__name__,
        "responses": {
            "200": {"description": "Success.", "content": content},
            **{str(status): {"description": "Error.", "content": _json(error)} for status in sorted(statuses)},
        },
    }
    if operation.body is not None:
        content = {operation.body_media: {"schema": schema_of[operation.body]}}
        description["requestBody"] = {"required": True, "content": content}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in operation.route.param_convertors
    ]
    if operation.query is not None:
        definition = msgspec.json.schema(operation.query)
        kind = definition["$defs"][operation.query.__name__]
        parameters += [
            {"name": name, "in": "query", "required": name in kind.get("required", ()), "schema": schema}
            for name, schema in kind["properties"].items()
        ]
    if parameters:
        description["parameters"] = parameters
    return description


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {JSON: {"schema": schema}}
