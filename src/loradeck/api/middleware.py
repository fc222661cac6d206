"""What every request passes first: it is given an id, and its key is found out. Knows headers and keys, no route."""

import secrets
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loradeck.api.errors import HttpError
from loradeck.api.keys import Keys

OPEN = frozenset({"/health", "/version", "/openapi.json"})  # for anyone who reaches the server
ID = "x-request-id"
MAX_ID = 128


class Guard:
    """Puts `id` and `key` on a request's state, and the id on its answer."""

    def __init__(self, app: ASGIApp, keys: Keys, respond: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._keys = keys
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        own = headers.get(ID, "")[:MAX_ID] or secrets.token_hex(16)

        async def sign(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[ID] = own
            await send(message)

        state = scope.setdefault("state", {})
        state["id"] = own
        app = self._app
        if scope["path"] not in OPEN:
            try:
                state["key"] = self._keys.who(headers.get("authorization"))
            except HttpError as error:
                app = self._respond(Request(scope), error)
        return await app(scope, receive, sign)
