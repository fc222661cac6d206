"""A text file as UTF-8, whatever its encoding, compressed or not; it is read in a stream.

Compression and encoding are recognised by the first bytes. An encoding of one byte a character (cp1252, as Excel writes
it) cannot be recognised for certain, so it must be named.
"""

import codecs
import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from loradeck.errors import DataError

CHUNK = 1 << 18
EXTRA = "Run pip install 'loradeck[zstd]'."
GZIP = re.compile(rb"\x1f\x8b")
ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one to skip
ZSTD_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
# UTF-32 before UTF-16, whose mark it begins with.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Without a mark: which of the first four bytes are zero, if the file begins with two ASCII characters.
ZEROS = {
    "x0x0": "utf-16-le",
    "0x0x": "utf-16-be",
    "x000": "utf-32-le",
    "000x": "utf-32-be",
}
SHOWN = 20  # bytes shown before and after one that cannot be decoded


@contextmanager
def open_utf8(
    path: Path, encoding: str | None = None, on_read: Callable[[int, int], None] | None = None
) -> Iterator[io.BufferedReader]:
    """Open a file's text as UTF-8, without a byte order mark.

    `encoding` is the name of its encoding, as Python knows it, unless a byte order mark tells; by default UTF-8, or
    UTF-16 or UTF-32 if it begins so. Reading raises DataError where it cannot be decompressed or decoded. `on_read` is
    called with the bytes of the file read so far, and with what they are once they are decompressed.

    Raises:
        OSError: it cannot be opened.
        DataError: it is compressed, and the package for that is not installed.
    """
    with path.open("rb") as file, as_utf8(path, file, encoding, on_read) as text:
        yield text


@contextmanager
def as_utf8(
    path: Path | str,
    file: io.BufferedReader,
    encoding: str | None = None,
    on_read: Callable[[int, int], None] | None = None,
) -> Iterator[io.BufferedReader]:
    """Give the text of an open file, which errors call `path`, as `open_utf8` does."""
    with ExitStack() as stack:
        content = stack.enter_context(_decompressed(path, file))
        text = _Utf8(path, content, encoding, lambda size: on_read and on_read(file.tell(), size))
        yield stack.enter_context(io.BufferedReader(text, CHUNK))


def _decompressed(path: Path | str, file: io.BufferedReader) -> Any:
    """Return what a file holds, decompressed if it is compressed, as a context."""
    head = file.peek(4)
    if GZIP.match(head):
        return gzip.GzipFile(fileobj=file)
    if ZSTD.match(head):
        try:
            return import_module(ZSTD_MODULE).ZstdFile(file)
        except ImportError as error:
            raise DataError(f"{path} needs the package {ZSTD_MODULE}", hint=EXTRA) from error
    return file


class _Utf8(io.RawIOBase):
    """Encodes a file's text as UTF-8 while it is read."""

    def __init__(
        self, path: Path | str, file: BinaryIO, encoding: str | None, on_chunk: Callable[[int], object]
    ) -> None:
        """`on_chunk` is called with the bytes of the file so far."""
        self.path, self.file, self.encoding, self.on_chunk = path, file, encoding, on_chunk
        self.size = 0
        self.decoder: codecs.IncrementalDecoder | None = None
        self.line = 1
        self.is_ascii = True
        """Whether all text so far is."""
        self.rest = b""
        """Text not yet returned."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        ended = False
        while not self.rest and not ended:
            chunk = self._chunk()
            ended = not chunk
            self.rest = self._decode(chunk).encode()
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size

    def _chunk(self) -> bytes:
        try:
            chunk = self.file.read(CHUNK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._damaged(error) from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # of a package that may not be installed
                raise
            raise self._damaged(error) from error
        self.size += len(chunk)
        self.on_chunk(self.size)
        return chunk

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.path} cannot be decompressed after line {self.line}: {error}", hint="Copy it again.")

    def _decode(self, chunk: bytes) -> str:
        first = self.decoder is None
        if self.decoder is None:
            self.encoding = _recognised(chunk) or self.encoding or "utf-8"
            self.decoder = codecs.getincrementaldecoder(self.encoding)()
        try:
            text = self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise self._undecodable(error) from error
        self.line += text.count("\n")
        self.is_ascii = self.is_ascii and text.isascii()
        return text.removeprefix("\ufeff") if first else text

    def _undecodable(self, error: UnicodeDecodeError) -> DataError:
        """Say which byte it is, and how its text reads in the encoding that is likely."""
        content, start = bytes(error.object), error.start
        line = self.line + content.count(b"\n", 0, start)
        what = f"{self.path}:{line}: byte 0x{content[start]:02x} is not {self.encoding}"
        if self.encoding != "utf-8":
            return DataError(what, hint="Give the encoding that the file was written in.")
        if b"\0" in content:
            return DataError(f"{self.path} is not text", hint="Export it as one of the forms that are read.")
        if not (self.is_ascii and content[:start].isascii()):
            return DataError(f"{what}, though text before it is; the file is damaged there", hint="Correct that line.")
        begin = content.rfind(b"\n", 0, start) + 1
        excerpt = content[max(begin, start - SHOWN) : start + SHOWN].partition(b"\n")[0].decode("cp1252", "replace")
        return DataError(
            f"{what}; as cp1252, the encoding of Windows, it reads {excerpt.strip()!r}",
            hint="If that looks right, name this encoding, else the one that the file was written in:",
            python='DataConfig(encoding="cp1252").',
            cli="--encoding cp1252.",
            http='"lora": {"encoding": "cp1252"}',
        )


def _recognised(head: bytes) -> str | None:
    """Return the encoding that the first bytes of a file show, or None."""
    mark = next((mark for mark in BYTE_ORDER_MARKS if head.startswith(mark)), None)
    return BYTE_ORDER_MARKS[mark] if mark else ZEROS.get("".join("x" if byte else "0" for byte in head[:4]))
