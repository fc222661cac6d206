"""Refuses requests for other hosts, and those whose body has no clear length, before anything else reads them."""

import re
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loradeck.api.errors import HttpError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class HostMiddleware:
    """Lets in requests for this machine's own names and for `hosts`, which may begin with `*.`; "*" is any host.

    Without keys, a web page could otherwise reach the server by DNS rebinding: by a name of its own that it points at
    this machine. A browser always sends a Host header, so HTTP/1.0 without one is let in.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], on_error: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._hosts = [host.lower() for host in (*LOOPBACK, *hosts)]
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            try:
                self._check(Headers(scope=scope), scope.get("http_version", "1.1"))
            except HttpError as error:
                app = self._on_error(Request(scope), error)
        await app(scope, receive, send)

    def _check(self, headers: Headers, http_version: str) -> None:
        if "content-length" in headers and "transfer-encoding" in headers:  # where does a proxy see its end?
            raise HttpError(
                400, "A request has either a content-length or a transfer-encoding.", headers={"connection": "close"}
            )
        host = headers.get("host")
        if host is None and http_version == "1.0":
            return
        name = _name(host or "")
        if not any(name == pattern or _is_within(name, pattern) for pattern in self._hosts):
            raise HttpError(
                400,
                f"This server does not answer for the host {(host or '')[:128]!r}; its flag --hosts allows others.",
                hint="Ask for http://localhost.",
            )


def _name(host: str) -> str:
    """Return a Host header's name without its port; "" if it is invalid."""
    match = re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d*)?", host)
    return match[1].lower() if match else ""


def _is_within(name: str, pattern: str) -> bool:
    return pattern == "*" or (pattern.startswith("*.") and name.endswith(pattern[1:]))
