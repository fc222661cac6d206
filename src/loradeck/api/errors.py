"""Which HTTP answer an error is, written once: its status, and a body in vLLM's shape. Knows no route."""

import math
from collections.abc import Callable, Mapping
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from loradeck.errors import (
    AdapterError,
    AdapterNameError,
    BusyError,
    ConfigError,
    LoradeckError,
    RouteError,
    UnknownAdapterError,
)

JSON = "application/json"
CLIENT_GONE = 499  # nginx's number for a client that did not wait; nobody reads it
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}
STATUSES: dict[type[LoradeckError], int] = {
    ConfigError: 400,
    RouteError: 400,
    AdapterNameError: 400,
    UnknownAdapterError: 404,
    AdapterError: 422,  # it is there, and asking again will not fix it
    BusyError: 429,
}


class HttpError(LoradeckError):
    """A refusal that only the door knows: `param` names the field of the request that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        kind: str = "",
        hint: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.param = param
        self.kind = kind
        self.headers = dict(headers or {})


def ending() -> HttpError:
    """Return what a server says that takes nothing more; the body is llama.cpp's, as far as that goes."""
    return HttpError(503, "The server is about to end.", kind="unavailable_error", headers={"retry-after": "1"})


class Error(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(msgspec.Struct):
    """The body of every answer that is not a success."""

    error: Error


def answer_of(error: Exception) -> tuple[Error, dict[str, str]]:
    """Return what a client is told of an error, and the headers that go with it."""
    headers: dict[str, str] = {}
    param, kind = None, ""
    match error:
        case HttpError():
            status, text, headers, param, kind = error.status, str(error), error.headers, error.param, error.kind
        case LoradeckError():
            status = next((code for known, code in STATUSES.items() if isinstance(error, known)), 500)
            text = str(error)
            if isinstance(error, UnknownAdapterError):  # its own words list names that this client may not know
                text, param = f"{error.message}\nGET /v1/models lists what there is.", "model"
            if isinstance(error, BusyError):
                headers = {"retry-after": str(math.ceil(error.retry_after))}
        case HTTPException():
            status, text, headers = error.status_code, error.detail, dict(error.headers or {})
        case ClientDisconnect():
            status, text = CLIENT_GONE, "The client has gone."
        case _:
            status, text = 500, "The server failed; its log says why."
    return Error(text, kind or TYPES.get(status) or _phrase(status), param, status), headers


def _phrase(status: int) -> str:
    return "InternalServerError" if status >= 500 else HTTPStatus(status).phrase.replace(" ", "") + "Error"


def body_of(error: Error) -> bytes:
    """Return the JSON of an error."""
    return msgspec.json.encode(ErrorAnswer(error))


def responder(hide: str) -> Callable[[Request, Exception], Response]:
    """Return the handler of all errors. `hide` is the store's folder: where it lies is no client's business."""

    def respond(_: Request, failure: Exception) -> Response:
        error, headers = answer_of(failure)
        error.message = concealed(error.message, hide)
        return Response(body_of(error), error.code, headers, JSON)

    return respond


def concealed(text: str, folder: str) -> str:
    """Return a message without the path of the store's folder."""
    return text.replace(f"{folder}/", "").replace(folder, "the store") if folder else text
