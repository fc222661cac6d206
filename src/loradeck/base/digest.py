"""A cache of files' sha256, so that a file is read again only if it may have changed."""

import hashlib
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from loradeck.disk import write_file

SETTLED = 10**9  # ns; a second write within one tick of the file system's clock would not change the times

Stamp = tuple[int, int, int, int]


class DigestCache:
    """The digests of files, stored in a JSON file.

    A digest is valid while the file's inode, size and times stay the same: every write, and every rename over the file,
    sets its change time (ctime), which no program can set back. It does not notice a decaying disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, tuple[Stamp, str]] = {}
        with suppress(OSError, msgspec.DecodeError):  # missing or damaged: every file is read again
            self._entries = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[Stamp, str]])

    def of(self, path: Path) -> str:
        """Return a file's sha256, in hex.

        Raises:
            OSError: it cannot be read.
        """
        key, stamp = str(path.resolve()), _stamp(path)
        entry = self._entries.get(key)
        if entry and entry[0] == stamp:
            return entry[1]
        digest = sha256(path)
        if _stamp(path) == stamp and time.time_ns() - max(stamp[2:]) > SETTLED:
            self._entries[key] = stamp, digest
            with suppress(OSError):  # a read-only cache still works
                write_file(self.path, msgspec.json.encode(self._entries))
        return digest


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
