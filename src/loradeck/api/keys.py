"""API keys: who asks, which adapters a key may use, and whether it may load and unload. Knows hashes, never keys.

A keys file is TOML, one table per key:

    [alice]
    sha256 = "..."                  # what `printf %s "$KEY" | sha256sum` prints
    adapters = ["poet", "team-*"]   # patterns of names, all by default; the base is everybody's
    control = false                 # may load and unload, and read the metrics
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import msgspec

from loradeck.api.errors import HttpError
from loradeck.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Key:
    """Who asks, and what it may do."""

    name: str
    sha256: str
    adapters: tuple[str, ...] = ("*",)
    control: bool = False

    def may_use(self, name: str) -> bool:
        """Say whether an adapter of this name, in any version, may be used."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)

    def check_use(self, names: Iterable[str]) -> None:
        """Refuse adapters that this key may not use, whether there are any of these names or not.

        Raises:
            HttpError: 403.
        """
        for name in names:
            if not self.may_use(name):
                raise HttpError(403, f"This API key may not use the adapter {name[:128]!r}.", param="model")

    def check_control(self) -> None:
        """Refuse a key that may not load and unload.

        Raises:
            HttpError: 403.
        """
        if not self.control:
            raise HttpError(403, "This API key may not control the server.", hint="Ask with one that has control.")


ANYONE = Key("", "", control=True)  # where there are no keys, only this machine can ask


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    adapters: tuple[str, ...] = ("*",)
    control: bool = False


class Keys:
    """The keys of a server; none at all lets anyone in, so a server without keys listens on the loopback only."""

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def load(cls, path: str | Path) -> "Keys":
        """Read a keys file.

        Raises:
            ConfigError: it cannot be read, holds no key, or a key is not as it should be.
        """
        hint = 'A key is a table [name] with sha256 = "..."; adapters = ["..."] and control = true are for choice.'
        try:
            entries = msgspec.toml.decode(Path(path).read_bytes(), type=dict[str, _Entry])
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no keys file: {error}", hint=hint) from error
        if not entries:
            raise ConfigError(f"{path} holds no key", hint=hint)
        return cls([Key(name, own.sha256, own.adapters, own.control) for name, own in entries.items()])

    def who(self, authorization: str | None) -> Key:
        """Return whose a request is, by its Authorization header.

        Raises:
            HttpError: 401.
        """
        if not self._keys:
            return ANYONE
        scheme, _, token = (authorization or "").partition(" ")
        given = hashlib.sha256(token.strip().encode("latin-1", "replace")).hexdigest()  # headers are latin-1
        matching = [key for key in self._keys if hmac.compare_digest(key.sha256, given)]  # all, so time tells nothing
        if scheme.lower() == "bearer" and matching:
            return matching[0]
        raise HttpError(
            401,
            "This server wants an API key." if not authorization else "This is none of the server's API keys.",
            hint="Send the header Authorization: Bearer KEY.",
            headers={"www-authenticate": "Bearer"},
        )
