"""The OpenAPI document of a server, from the Structs that it reads and writes. Knows types and paths; runs nothing."""

from dataclasses import dataclass
from typing import Any

import msgspec

from loradeck import __version__
from loradeck.api.errors import JSON, ErrorAnswer

REF = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path: what it takes and gives."""

    method: str
    path: str
    summary: str
    takes: Any = None
    """The type of its body; None where it takes none."""
    gives: Any = None
    """The type of its answer as JSON; None where it is text."""
    generates: bool = False
    """Whether it takes an engine's time; its answer may be a stream of events."""
    also: tuple[int, ...] = ()
    """Statuses besides 200 and those of every operation."""


def document(operations: list[Operation]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of these operations."""
    kinds = [kind for own in operations for kind in (own.takes, own.gives) if kind is not None]
    schemas, components = msgspec.json.schema_components([*kinds, ErrorAnswer], ref_template=REF)
    found = dict(zip(map(id, kinds), schemas, strict=False))
    error = schemas[-1]
    paths: dict[str, dict[str, Any]] = {}
    for own in operations:
        paths.setdefault(own.path, {})[own.method.lower()] = _operation(own, found, error)
    return {
        "openapi": "3.1.0",
        "info": {"title": "loradeck", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _operation(own: Operation, found: dict[int, dict[str, Any]], error: dict[str, Any]) -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}} if own.gives is None else _json(found[id(own.gives)])
    statuses = {401, 403, 500, *own.also}
    if own.takes is not None:
        statuses |= {400, 413, 415}
    if own.generates:
        statuses |= {404, 422, 429, 503}
        content["text/event-stream"] = dict[str, Any]()  # events, for which 3.1 has no schema
    said: dict[str, Any] = {
        "summary": own.summary,
        "operationId": own.summary.lower().replace(" ", "_"),
        "responses": {
            "200": {"description": "Done.", "content": content},
            **{str(status): {"description": "Refused.", "content": _json(error)} for status in sorted(statuses)},
        },
    }
    if own.takes is not None:
        said["requestBody"] = {"required": True, "content": _json(found[id(own.takes)])}
    names = [part[1:-1] for part in own.path.split("/") if part.startswith("{")]
    if names:
        said["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    return said


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {JSON: {"schema": schema}}
