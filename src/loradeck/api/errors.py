"""HTTP errors: the status of every exception, and a body in vLLM's shape."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from loradeck.api.responses import ErrorInfo, ErrorResponse, json_response
from loradeck.disk import cache_folder
from loradeck.errors import (
    AdapterError,
    AdapterNameError,
    BusyError,
    ConfigError,
    DataError,
    FileTooLargeError,
    LogitsError,
    LoradeckError,
    QuotaError,
    RequestTimeoutError,
    RouteError,
    StorageError,
    StoreUnreachableError,
    UnknownAdapterError,
    UnknownFileError,
    UnknownJobError,
)
from loradeck.lora.hub import with_hub_ids
from loradeck.store import with_urls

CLIENT_CLOSED_REQUEST = 499  # nginx's status; nobody is left to read it
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
    CLIENT_CLOSED_REQUEST: "ClientClosedRequestError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
    507: "InsufficientStorageError",
}
STATUSES: dict[type[LoradeckError], int] = {
    ConfigError: 400,
    RouteError: 400,
    AdapterNameError: 400,
    UnknownAdapterError: 404,
    StoreUnreachableError: 503,
    AdapterError: 422,  # the adapter exists, and a retry will not fix it
    DataError: 400,
    UnknownFileError: 404,
    UnknownJobError: 404,
    FileTooLargeError: 413,
    QuotaError: 429,
    StorageError: 507,
    BusyError: 429,
    LogitsError: 422,
    RequestTimeoutError: 504,
}
DO_NOT_RETRY = {"x-should-retry": "false"}  # OpenAI's clients send a 429, 504 or 507 again otherwise


class HttpError(LoradeckError):
    """An error with a status of its own; `param` is the field of the request that caused it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        error_type: str = "",
        hint: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.param = param
        self.error_type = error_type
        self.headers = dict(headers or {})


def shutting_down() -> HttpError:
    """Return the error of a server that takes no more requests; the type is llama.cpp's."""
    return HttpError(503, "The server is shutting down.", error_type="unavailable_error", headers={"retry-after": "1"})


@contextmanager
def invalid_field(param: str) -> Iterator[None]:
    """Turn a ConfigError into a 400 that names the field of the request."""
    try:
        yield
    except ConfigError as error:
        message = LoradeckError(error.message, error.problems).text("http")
        raise HttpError(400, message, param=param, hint=error.hint) from error


def status_of(error: LoradeckError) -> int:
    """Return the status of an error that has none of its own."""
    return next((code for base, code in STATUSES.items() if isinstance(error, base)), 500)


def error_info(error: Exception, store: str) -> tuple[ErrorInfo, dict[str, str]]:
    """Return what a client reads about an error, and the headers of the response.

    `store` is the path of the adapters' folder, or its URL. Clients must not learn it, nor where the caches are: they
    are cut out of the message.
    """
    headers: dict[str, str] = {}
    param, error_type = None, ""
    match error:
        case HttpError():
            status, text, headers = error.status, error.text("http"), error.headers
            param, error_type = error.param, error.error_type
        case LoradeckError():
            status = status_of(error)
            text = error.text("http")
            if isinstance(error, UnknownAdapterError):  # its hint lists names that this client may not know
                text, param = f"{error.message}\nGET /v1/models lists the models.", "model"
            if isinstance(error, BusyError):
                headers = {"retry-after": str(math.ceil(error.retry_after))}
            if isinstance(error, RequestTimeoutError | QuotaError | StorageError):  # soon, it would be the same
                headers = DO_NOT_RETRY
        case HTTPException():
            status, text, headers = error.status_code, error.detail, dict(error.headers or {})
            if status == 405:
                text += f"; this route takes {headers.get('Allow', '')}."
        case ClientDisconnect():
            status, text = CLIENT_CLOSED_REQUEST, "The client closed the connection."
        case _:
            status, text = 500, "Internal server error; the server's log has the details."
    text = with_urls(with_hub_ids(text)).replace(f"{cache_folder()}/", "")
    if store:
        text = text.replace(f"{store}/", "").replace(f"the store {store}", "the store").replace(store, "the store")
    return ErrorInfo(text, error_type or TYPES.get(status) or _type_of(status), param, status), headers


def error_handler(store: str) -> Callable[[Request, Exception], Response]:
    """Return the application's exception handler; `store` as in `error_info`."""

    def handle(request: Request, error: Exception) -> Response:
        request.state.error = error  # for the log
        info, headers = error_info(error, store)
        return json_response(ErrorResponse(info), info.code, headers)

    return handle


def _type_of(status: int) -> str:
    return "InternalServerError" if status >= 500 else HTTPStatus(status).phrase.replace(" ", "") + "Error"
