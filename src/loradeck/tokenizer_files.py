"""The files of a tokenizer and its chat template that other tools write beside an adapter. Needs no torch."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import msgspec

from loradeck.disk import Stamp, read_start
from loradeck.errors import AdapterError

# Any of these is a whole vocabulary; the next two add to one.
VOCABULARIES = frozenset({"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"})
ADDITIONS = frozenset({"merges.txt", "added_tokens.json"})
CONFIG, SPECIAL_TOKENS, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
NAMES = VOCABULARIES | ADDITIONS | {CONFIG, SPECIAL_TOKENS, TEMPLATE}
MAX_BYTES = 256 << 20  # of all files together; the largest vocabularies have some 40 MB
MAX_TEMPLATE = 1 << 20  # bytes
HINT = "Save the tokenizer there again, or remove these files to use the base's."


@dataclass(frozen=True)
class TokenizerFiles:
    """Which of a folder's files belong to a tokenizer, as they were when the folder was last looked into."""

    folder: Path = Path()
    stamp: Stamp = ()
    added_tokens: int = 0
    """How many tokens beyond the base's the adapter of the folder has rows for."""

    @classmethod
    def of(cls, folder: Path, stamp: Stamp) -> Self:
        """Return the tokenizer's files among those of a folder's stamp."""
        return cls(folder, tuple(file for file in stamp if file[0] in NAMES))

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the files; empty if the folder has no tokenizer and no template of its own."""
        return frozenset(name for name, *_ in self.stamp)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, *_ in self.stamp)

    def read(self) -> dict[str, bytes]:
        """Return the content of each file.

        Raises:
            AdapterError: a file is missing, has changed, is too large, or is not JSON or text though its name says so.
        """
        if self.nbytes > MAX_BYTES:
            raise AdapterError(
                f"the tokenizer in {self.folder} has {self.nbytes} bytes, more than the limit of {MAX_BYTES}", hint=HINT
            )
        return {name: self._read(name, size, mtime) for name, size, mtime, *_ in self.stamp}

    def _read(self, name: str, size: int, mtime: int) -> bytes:
        path = self.folder / name
        if name == TEMPLATE and size > MAX_TEMPLATE:
            raise AdapterError(f"{path} has {size} bytes, more than the limit of {MAX_TEMPLATE}", hint=HINT)
        try:
            content, status = read_start(path, size + 1)
        except OSError as error:
            hint = "Load the adapter again."
            raise AdapterError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
        if (status.st_size, status.st_mtime_ns) != (size, mtime):
            raise AdapterError(f"{path} has changed since the adapter was found", hint="Load the adapter again.")
        try:
            if name.endswith(".json"):
                msgspec.json.decode(content, type=dict[str, msgspec.Raw])
            elif not name.endswith(".model"):
                content.decode()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            kind = "a JSON object" if name.endswith(".json") else "text in UTF-8"
            raise AdapterError(f"{path} is not {kind}: {error}", hint=HINT) from None
        return content


def digest_of(contents: Mapping[str, bytes]) -> str:
    """Return one sha256, in hex, of files' names and contents."""
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
    return digest.hexdigest()
