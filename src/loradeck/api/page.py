"""The files of the page that a browser shows at `/`. They hold nothing of this server, so they need no API key."""

import hashlib
from functools import cache
from importlib.resources import files

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.errors import HttpError

INDEX = "index.html"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # ask whether it has changed; a newer server has newer files
}


async def get_page(request: Request) -> Response:
    """Return the page, for a browser."""
    return await _answer(request, INDEX)


async def get_page_file(request: Request) -> Response:
    """Return one of the page's files."""
    return await _answer(request, request.path_params["file"])


async def _answer(request: Request, name: str) -> Response:
    page = await run_sync(page_files)
    if name not in page:
        raise HttpError(404, f"The page has no file {name[:128]!r}.")
    content, media_type, etag = page[name]
    headers = {**HEADERS, "etag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


@cache
def page_files() -> dict[str, tuple[bytes, str, str]]:
    """Return the content, the media type and the entity tag of each file of the page, by its name."""
    page = {}
    for file in files("loradeck.page").iterdir():
        suffix = "." + file.name.rpartition(".")[2]
        if file.is_file() and suffix in TYPES:
            content = file.read_bytes()
            page[file.name] = (content, TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return page
