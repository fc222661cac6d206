"""A request's JSON as one of the Structs of `schema`: unknown fields pass, wrong types are refused with their path."""

import logging
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from loradeck.api.errors import JSON, HttpError

T = TypeVar("T")
log = logging.getLogger(__name__)


async def read(request: Request, kind: type[T], most: int, harmless: Mapping[str, tuple[Any, ...]] | None = None) -> T:
    """Return a request's body, of `most` bytes at most.

    `harmless` says, for fields that cannot be honoured, with which values an answer means what the client meant.

    Raises:
        HttpError: 415 where it is not called JSON, 413, 400 with the field's name where it is not as it should be.
    """
    # A page in a browser can send anything else to a server on the loopback without asking it first (CORS).
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise HttpError(415, f"A request's content-type is {JSON}.")
    try:
        raw = msgspec.json.decode(await _bytes(request, most))
        value = msgspec.convert(raw, kind, str_keys=True)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        path = str(error).partition(" - at `")[2]
        raise HttpError(400, str(error), param=re.sub(r"^key in |^\$\.?|`$", "", path) or None) from error
    if isinstance(raw, dict):
        _check(raw, kind, harmless or {})
    return value


async def _bytes(request: Request, most: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise HttpError(413, f"A request's body has {most} bytes at most.")
    return bytes(body)


def _check(raw: dict[str, Any], kind: Any, harmless: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in harmless.items():
        if raw.get(name) not in (None, *values):
            raise HttpError(400, f"This server does not support {name}={raw[name]!r:.80}.", param=name)
    unknown = raw.keys() - {*kind.__struct_fields__, *harmless}
    if unknown:
        log.debug("fields of a %s that mean nothing here: %s", kind.__name__, ", ".join(sorted(unknown)))
