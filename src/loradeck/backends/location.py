"""Where a store is: a folder, or a URL. What reads URLs is imported only for a URL."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from loradeck.backends.folder import FolderBackend
from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from loradeck.backends.backend import Backend

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
CACHE_BYTES = "LORADECK_CACHE_BYTES"
DEFAULT_CACHE_BYTES = 16 << 30


def is_url(location: str | Path) -> bool:
    """Return whether this is a URL; a Path never is."""
    return isinstance(location, str) and URL.fullmatch(location) is not None


def open_backend(location: str | Path, cache_bytes: int | None, waiting: int | None) -> "Backend":
    """Return the backend of a folder or a URL.

    Raises:
        ConfigError: such a URL cannot be used, its package is missing, or the bytes of the cache are no number.
    """
    if isinstance(location, Path) or (match := URL.fullmatch(location)) is None:
        return FolderBackend(location)
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        return FolderBackend(_path(location, rest))
    from loradeck.backends.hub_place import HubPlace
    from loradeck.backends.place import PROTOCOLS, Place
    from loradeck.backends.remote import RemoteBackend

    if scheme not in PROTOCOLS:
        hint = f"Give a folder, or one of {', '.join(f'{each}://' for each in ('file', *PROTOCOLS))}."
        raise ConfigError(f"a store cannot be at {scheme}://", hint=hint)
    if not rest.strip("/"):
        raise ConfigError(f"{location} names no bucket or repository", hint=f"Give {scheme}://NAME/FOLDER.")
    kind = HubPlace if scheme == "hf" else Place
    return RemoteBackend(kind(f"{scheme}://{rest}"), _cache_bytes(cache_bytes), waiting)


def _path(location: str, rest: str) -> Path:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise ConfigError(f"{location} is on another machine", hint="Give file:///FOLDER, with three slashes.")
    return Path(unquote(f"/{path}"))


def _cache_bytes(cache_bytes: int | None) -> int:
    text = os.environ.get(CACHE_BYTES) if cache_bytes is None else str(cache_bytes)
    if not text:
        return DEFAULT_CACHE_BYTES
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"the bytes of the cache are {text!r}", hint=f"Give a number above 0: {CACHE_BYTES}.")
    return int(text)
