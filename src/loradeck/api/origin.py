"""The guard against foreign web pages, for requests that a browser sends to any server without asking it first.

A browser asks before a page sends JSON or a DELETE to another server, and the answer of this one allows only the pages
of `ServerConfig.origins`. It does not ask before a page sends a form, or a POST without a body: there the server itself
must look at who sends it.
"""

from starlette.requests import Request

from loradeck.api.config import ServerConfig
from loradeck.api.errors import HttpError


def check_origin(request: Request, config: ServerConfig) -> None:
    """Check that a request does not come from a foreign web page.

    Raises:
        HttpError: 403.
    """
    origin = request.headers.get("origin")  # browsers name it with whatever is no GET
    if origin is None or not {origin, "*"}.isdisjoint(config.origins):
        return
    if origin.partition("://")[2] != request.headers.get("host"):
        raise HttpError(
            403,
            f"The origin {origin[:128]!r} may not use this server; its flag --origins allows others.",
        )
