"""API keys: a file of them, what each may do, and the middleware that authenticates every request.

A keys file is TOML, one table per key:

    [alice]
    sha256 = "..."                  # what `printf %s "$KEY" | sha256sum` prints
    adapters = ["poet", "team-*"]   # patterns of names; all adapters by default; every key may use the base
    control = false                 # whether it may load and unload adapters and read the metrics
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loradeck.api.errors import HttpError
from loradeck.errors import ConfigError

PUBLIC_PATHS = frozenset({"/health", "/version", "/openapi.json"})


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A client, and what it may do."""

    name: str
    sha256: str
    adapters: tuple[str, ...] = ("*",)
    control: bool = False

    def may_use(self, name: str) -> bool:
        """Return whether this key may use an adapter, in any version."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)

    def check_adapters(self, names: Iterable[str]) -> None:
        """Check that this key may use these adapters, whether or not they exist.

        Raises:
            HttpError: 403.
        """
        for name in names:
            if not self.may_use(name):
                raise HttpError(403, f"This API key may not use the adapter {name[:128]!r}.", param="model")

    def check_control(self) -> None:
        """Check that this key may load and unload adapters and read the metrics.

        Raises:
            HttpError: 403.
        """
        if not self.control:
            raise HttpError(403, "This API key may not control the server.", hint="Use a key with control = true.")


ANONYMOUS = ApiKey("", "", control=True)  # without keys, only this machine can reach the server


class _KeyTable(msgspec.Struct, forbid_unknown_fields=True):
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    adapters: tuple[str, ...] = ("*",)
    control: bool = False


class ApiKeys:
    """The keys of a server. Without any, every request is let in."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @classmethod
    def load(cls, path: str | Path) -> "ApiKeys":
        """Read a keys file.

        Raises:
            ConfigError: it cannot be read, holds no key, or holds an invalid one.
        """
        hint = 'A key is a table [name] with sha256 = "..."; adapters = ["..."] and control = true are optional.'
        try:
            tables = msgspec.toml.decode(Path(path).read_bytes(), type=dict[str, Any])
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"invalid keys file {path}: {error}", hint=hint) from error
        if not tables:
            raise ConfigError(f"{path} holds no key", hint=hint)
        keys = []
        for name, fields in tables.items():
            try:
                table = msgspec.convert(fields, _KeyTable)
            except msgspec.ValidationError as error:
                raise ConfigError(f"invalid keys file {path}: [{name}]: {error}", hint=hint) from error
            keys.append(ApiKey(name, table.sha256, table.adapters, table.control))
        return cls(keys)

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Return the key of a request from its Authorization header.

        Raises:
            HttpError: 401.
        """
        if not self._keys:
            return ANONYMOUS
        scheme, _, token = (authorization or "").partition(" ")
        sha256 = hashlib.sha256(token.strip().encode("latin-1", "replace")).hexdigest()  # headers are latin-1
        # Compare with all keys, so that the time taken reveals nothing.
        matches = [key for key in self._keys if hmac.compare_digest(key.sha256, sha256)]
        if scheme.lower() == "bearer" and matches:
            return matches[0]
        raise HttpError(
            401,
            "Invalid API key." if authorization else "This server requires an API key.",
            hint="Send the header Authorization: Bearer KEY.",
            headers={"www-authenticate": "Bearer"},
        )


class AuthMiddleware:
    """Sets `request.state.key`."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, on_error: Callable[[Request, Exception], Response]) -> None:
        self._app = app
        self._keys = keys
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        app = self._app
        if scope["path"] not in PUBLIC_PATHS:
            try:
                authorization = Headers(scope=scope).get("authorization")
                scope.setdefault("state", {})["key"] = self._keys.authenticate(authorization)
            except HttpError as error:
                app = self._on_error(Request(scope), error)
        return await app(scope, receive, send)
