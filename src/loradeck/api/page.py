"""The files of the page that a browser shows at `/`. They hold nothing of this server, so they need no API key."""

import gzip
import hashlib
from dataclasses import dataclass
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
    "vary": "accept-encoding",
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
    file = page[name]
    headers = {**HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    if "gzip" not in request.headers.get("accept-encoding", ""):
        return Response(file.content, headers=headers, media_type=file.media_type)
    return Response(file.compressed, headers={**headers, "content-encoding": "gzip"}, media_type=file.media_type)


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page, as it is and compressed."""

    content: bytes
    compressed: bytes
    media_type: str
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """Return the files of the page by name."""
    page = {}
    for file in files("loradeck.page").iterdir():
        suffix = "." + file.name.rpartition(".")[2]
        if file.is_file() and suffix in TYPES:
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            page[file.name] = PageFile(content, gzip.compress(content, mtime=0), TYPES[suffix], etag)
    return page
