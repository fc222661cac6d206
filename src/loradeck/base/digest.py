"""A file's sha256, read again only where the file may have changed. Knows files; knows no models."""

import hashlib
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from loradeck.disk import write_file

SETTLED = 10**9  # ns: a second write within one tick of the file system's clock leaves the times as they are

Stamp = tuple[int, int, int, int]


class Digests:
    """What is known of files, kept in a file of its own.

    A digest holds while the file's number, size and times do: every write, and every rename over it, sets the time of
    change (ctime), which no program can set back. A disk that decays by itself goes unnoticed.
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self._known: dict[str, tuple[Stamp, str]] = {}
        with suppress(OSError, msgspec.DecodeError):  # there is none yet, or it is damaged: then all is read again
            self._known = msgspec.json.decode(memory.read_bytes(), type=dict[str, tuple[Stamp, str]])

    def of(self, path: Path) -> str:
        """Return a file's sha256, in hex.

        Raises:
            OSError: it cannot be read.
        """
        key, stamp = str(path.resolve()), _stamp(path)
        known = self._known.get(key)
        if known and known[0] == stamp:
            return known[1]
        digest = sha256(path)
        if _stamp(path) == stamp and time.time_ns() - max(stamp[2:]) > SETTLED:
            self._known[key] = stamp, digest
            with suppress(OSError):  # a cache that cannot be written to is used all the same
                write_file(self.memory, msgspec.json.encode(self._known))
        return digest


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
