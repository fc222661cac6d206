"""What every request passes first: it gets an id, a line in the log, and an end when the server shuts down."""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loradeck.api.errors import shutting_down
from loradeck.api.state import ServerState
from loradeck.errors import LoradeckError

if TYPE_CHECKING:
    from loradeck.serve.generation import Generation
    from loradeck.serve.pooling_result import PoolingResult

REQUEST_ID = "x-request-id"
MAX_REQUEST_ID = 128  # characters
OPERATORS_STATUSES = (422, 429)  # below 500, but not the client's doing: adapters, the disk, a full server

log = logging.getLogger(__name__)


class RequestMiddleware:
    """Sends each request's id back, answers unexpected exceptions, and writes the log's line of the request.

    The line has what the application leaves in `request.state`: `key`, `generations` and `error`.
    """

    def __init__(self, app: ASGIApp, state: ServerState, on_error: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._state = state
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.monotonic()
        request = Request(scope)
        request_id = _request_id(Headers(scope=scope).get(REQUEST_ID, ""))
        status: int | None = None
        self._state.unanswered += 1

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._state.unanswered -= 1
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, self._until_shutdown(receive), send_with_id)
        except Exception as error:
            if status is not None:
                raise  # the server closes the connection, and logs the error
            log.error("request %(id)s failed", {"id": request_id}, exc_info=error)
            await self._on_error(request, error)(scope, receive, send_with_id)
        finally:
            self._state.unanswered -= status is None
            self._log(request, {"id": request_id, "status": status, "seconds": time.monotonic() - started}, started)

    def _until_shutdown(self, receive: Receive) -> Receive:
        """Return a `receive` that fails if the server shuts down before the body is complete."""
        is_complete = False

        async def receive_in_time() -> Message:
            nonlocal is_complete
            if is_complete:
                return await receive()  # the client's disconnect
            try:
                async with self._state.reading_body():
                    message = await receive()
            except TimeoutError:
                raise shutting_down() from None
            is_complete = not message.get("more_body", False)
            return message

        return receive_in_time

    def _log(self, request: Request, fields: dict[str, Any], started: float) -> None:
        key, error = getattr(request.state, "key", None), getattr(request.state, "error", None)
        if key is not None and key.name:
            fields["key"] = key.name
        if generations := getattr(request.state, "generations", ()):
            fields |= self._of_generations(generations, request.state.n, started)
        if error is not None:
            fields["error"] = _text(error)
        if request.client is not None:
            fields["client"] = request.client.host
        text = "".join(f" {name}=%({name}){'.3f' if isinstance(fields[name], float) else 's'}" for name in fields)
        path = request.scope.get("raw_path", b"").decode("latin-1")  # with its escapes
        status = fields["status"] or 500
        failed = status >= 500 or status in OPERATORS_STATUSES or "failed" in fields.get("finish", "")
        log.log(
            logging.WARNING if failed else logging.INFO,
            f"%(method)s %(path)s{text}",
            {"method": request.method, "path": path, **fields},
            exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
        )

    def _of_generations(
        self, generations: "Sequence[Generation | PoolingResult]", n: int, started: float
    ) -> dict[str, Any]:
        requests = [generation.request for generation in generations]
        fields: dict[str, Any] = {"model": self._state.names.base}
        if requests[0].versions:
            fields["adapter"] = requests[0].versions
        fields["prompt_tokens"] = sum(len(each.prompt) for each in requests[::n])
        fields["generated_tokens"] = sum(each.generated for each in requests)
        if times := [each.first_token for each in requests if each.first_token]:
            fields["first_token_seconds"] = min(times) - started
        fields["finish"] = ",".join(sorted({generation.finish or "cancelled" for generation in generations}))
        return fields


def _request_id(text: str) -> str:
    """Return a client's id without what could be mistaken for more than an id, or a new one."""
    return "".join(c for c in text if "!" <= c <= "~" and c not in "\"'=")[:MAX_REQUEST_ID] or secrets.token_hex(16)


def _text(error: Exception) -> str:
    """Return an error in one line, without its hint, which is for the client."""
    if isinstance(error, LoradeckError):
        return ": ".join([error.message, *error.problems[:1]])
    text = str(getattr(error, "detail", error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
