"""API keys: a file of them, what each may do, and the middleware that authenticates every request.

A keys file is TOML, one table per key:

    [alice]
    sha256 = "..."                  # what `printf %s "$KEY" | sha256sum` prints
    adapters = ["poet", "team-*"]   # patterns of names; all adapters by default; every key may use the base
    control = false                 # whether it may load and unload adapters and read the metrics
    train = false                   # whether it may upload files and train adapters, on a server that trains
    create = ["mine-*"]             # patterns of the names that it may give them; those of `adapters` by default
    max_upload_bytes = 1000000000   # size of all its files, without limit by default, as are the next two
    max_jobs = 4                    # jobs that wait or run
    max_job_tokens = 10000000       # tokens that one job is trained on
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loradeck.api.errors import HttpError
from loradeck.errors import ConfigError
from loradeck.live.records import Quota

PUBLIC_PATHS = frozenset({"/", "/health", "/version", "/openapi.json"})
PAGE = "/page/"  # files that hold nothing of this server
Limit: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
UNLIMITED = Quota()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A client, and what it may do."""

    name: str
    sha256: str
    adapters: tuple[str, ...] = ("*",)
    control: bool = False
    train: bool = False
    create: tuple[str, ...] | None = None
    quota: Quota = UNLIMITED

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

    def check_train(self) -> None:
        """Check that this key may upload files and train adapters.

        Raises:
            HttpError: 403.
        """
        if not self.train:
            raise HttpError(403, "This API key may not train adapters.", hint="Use a key with train = true.")

    def check_create(self, name: str, param: str) -> None:
        """Check that this key may publish an adapter of this name. `param` is the field that has it.

        Raises:
            HttpError: 403.
        """
        patterns = self.adapters if self.create is None else self.create
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            raise HttpError(
                403,
                f"This API key may not create the adapter {name[:128]!r}.",
                param=param,
                hint=f"It may create {', '.join(patterns) or 'none'}: set {param}.",
            )

    def check_control(self) -> None:
        """Check that this key may load and unload adapters and read the metrics.

        Raises:
            HttpError: 403.
        """
        if not self.control:
            raise HttpError(403, "This API key may not control the server.", hint="Use a key with control = true.")


ANONYMOUS = ApiKey("", "", control=True, train=True)  # without keys, only this machine can reach the server


class _KeyTable(msgspec.Struct, forbid_unknown_fields=True):
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    adapters: tuple[str, ...] = ("*",)
    control: bool = False
    train: bool = False
    create: tuple[str, ...] | None = None
    max_upload_bytes: Limit | None = None
    max_jobs: Limit | None = None
    max_job_tokens: Limit | None = None

    def key(self, name: str) -> ApiKey:
        quota = Quota(
            max_upload_bytes=self.max_upload_bytes, max_jobs=self.max_jobs, max_job_tokens=self.max_job_tokens
        )
        return ApiKey(name, self.sha256, self.adapters, self.control, self.train, self.create, quota)


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
        hint = 'A key is a table [name] with sha256 = "..."; the other keys are optional (see docs/serving.md).'
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
                keys.append(msgspec.convert(fields, _KeyTable).key(name))
            except msgspec.ValidationError as error:
                raise ConfigError(f"invalid keys file {path}: [{name}]: {error}", hint=hint) from error
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
        if scope["path"] not in PUBLIC_PATHS and not scope["path"].startswith(PAGE):
            try:
                authorization = Headers(scope=scope).get("authorization")
                scope.setdefault("state", {})["key"] = self._keys.authenticate(authorization)
            except HttpError as error:
                app = self._on_error(Request(scope), error)
        return await app(scope, receive, send)
