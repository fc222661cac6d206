"""The file that makes a version of a store elsewhere visible: where its files lie, their hashes, and what they say."""

import hashlib
from collections.abc import Iterable
from typing import Annotated

import msgspec

from loradeck.errors import AdapterError
from loradeck.lora.folder import CARD, CONFIG
from loradeck.lora.manifest import INDEX
from loradeck.stored import Facts
from loradeck.tokenizer_files import NAMES

MOST = 8 << 30  # bytes of an adapter

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class StoredFile(msgspec.Struct, frozen=True):
    """One file of a version."""

    name: Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*$")]
    size: Annotated[int, msgspec.Meta(ge=0, le=MOST)]
    sha256: Sha256


class VersionFile(msgspec.Struct, frozen=True):
    """A published version. It never changes."""

    folder: Annotated[str, msgspec.Meta(pattern=r"^[\w-]+$")]
    """The folder of its files, in that of its name."""
    published: float
    """In seconds since 1970."""
    files: Annotated[tuple[StoredFile, ...], msgspec.Meta(min_length=2, max_length=10_000)]
    facts: Facts
    """What a listing shows, so that nothing else is downloaded for it."""

    @classmethod
    def decode(cls, content: bytes, name: str) -> "VersionFile":
        """Read the content of the file; `name` is for the error.

        Raises:
            AdapterError: it is invalid.
        """
        try:
            version = msgspec.json.decode(content, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            hint = "Another program wrote it, or a newer loradeck. Remove the version, or update loradeck."
            raise AdapterError(f"the record of {name} is invalid: {error}", hint=hint) from error
        if problem := _problem([file.name for file in version.files]):
            raise AdapterError(f"the record of {name} is invalid: it {problem}")
        return version

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def sha256(self) -> str:
        """The identity of its content: see `Stored.sha256`."""
        return _digest(file for file in self.files if _computes(file.name))

    @property
    def key(self) -> str:
        """The sha256 of all files, the card and tokenizer included: their key in the cache."""
        return _digest(self.files)


def _digest(files: Iterable[StoredFile]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.sha256}  {file.name}\n".encode())
    return digest.hexdigest()


def _computes(name: str) -> bool:
    return name in (CONFIG, INDEX) or name.endswith(".safetensors")


def _problem(names: list[str]) -> str:
    if len(set(names)) < len(names):
        return "names a file twice"
    if strange := [name for name in names if not (_computes(name) or name == CARD or name in NAMES)]:
        return f"names {strange[0]}, which is no file of an adapter"
    return "" if CONFIG in names else f"names no {CONFIG}"
