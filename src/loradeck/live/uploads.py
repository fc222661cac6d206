"""The files of a live server: each in a folder of its own, and a row in the database that lists it."""

import errno
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from loradeck.disk import new_folder
from loradeck.errors import DataError, FileTooLargeError, StorageError, UnknownFileError
from loradeck.live.database import Database
from loradeck.live.records import FileRecord, Page, new_id

CONTENT = "content"
MAX_FILENAME = 200  # bytes of UTF-8
SPARE = 64 << 20  # bytes of the disk that uploads leave to the database, checkpoints and adapters

log = logging.getLogger(__name__)


class Upload:
    """A file while it arrives. Its `record` is there once the block of `Uploads.upload` has ended."""

    record: FileRecord

    def __init__(self, file: BinaryIO, check_size: Callable[[int], None]) -> None:
        self.bytes = 0
        self.digest = hashlib.sha256()
        self._file = file
        self._check_size = check_size

    def write(self, content: bytes) -> None:
        """Add to the file.

        Raises:
            FileTooLargeError: it is too large.
            OSError: the disk cannot take it.
        """
        self.bytes += len(content)
        self._check_size(self.bytes)
        self.digest.update(content)
        self._file.write(content)


class Uploads:
    """The files of all owners, who see their own only. Thread-safe."""

    def __init__(self, database: Database, folder: Path) -> None:
        """Open the files, and remove what a kill left half.

        Raises:
            StorageError: the folder cannot be read or changed.
        """
        self._database = database
        self._folder = folder
        with _problems(folder):
            folder.mkdir(parents=True, exist_ok=True)
            records = {record.id: record for record in self._records()}
            for path in folder.iterdir():
                if path.name not in records:
                    shutil.rmtree(path)
            for record in records.values():
                if not self._path(record.id).is_file():
                    log.warning("the content of the file %(id)s is gone", {"id": record.id})
                    self._forget(record.id)

    @contextmanager
    def upload(
        self, owner: str, filename: str, purpose: str, *, max_bytes: int | None = None, max_total: int | None = None
    ) -> Iterator[Upload]:
        """Yield a new file to write to. It is there, and on the disk, once the block has ended without an exception.

        Args:
            owner: Whose file it is.
            filename: A client's name of it; folders are cut off.
            purpose: OpenAI's word for what it is for.
            max_bytes: Its maximum size.
            max_total: Maximum size of all the owner's files.

        Raises:
            DataError: it is empty.
            FileTooLargeError: it is too large, or too much together with the owner's other files.
            StorageError: the disk cannot take it.
        """
        id = new_id("file")
        filename = plain_name(filename)
        total = self.total_bytes(owner)

        def check_size(size: int) -> None:
            if max_bytes is not None and size > max_bytes:
                raise FileTooLargeError(f"{filename!r} is larger than {max_bytes} bytes")
            if max_total is not None and total + size > max_total:
                raise FileTooLargeError(
                    f"{filename!r} would make more than {max_total} bytes of all your files; there are {total} already",
                    hint="Delete files that are not needed.",
                )

        with _problems(self._folder):
            with new_folder(self._folder / id) as new:
                with (new / CONTENT).open("xb") as file:
                    upload = Upload(file, check_size)
                    yield upload
                if not upload.bytes:
                    raise DataError(f"{filename!r} is empty")
            upload.record = FileRecord(
                id=id,
                owner=owner,
                filename=filename,
                purpose=purpose,
                bytes=upload.bytes,
                created_at=int(time.time()),
                sha256=upload.digest.hexdigest(),
            )
            try:
                with self._database.transaction() as connection:
                    total = self.total_bytes(owner)  # others may have been uploaded meanwhile
                    check_size(upload.bytes)
                    query = "INSERT INTO files (id, owner, purpose, bytes, record) VALUES (?, ?, ?, ?, ?)"
                    record = msgspec.json.encode(upload.record).decode()
                    connection.execute(query, (id, owner, purpose, upload.bytes, record))
            except BaseException:
                shutil.rmtree(self._folder / id, ignore_errors=True)
                raise

    def check_room(self, size: int) -> None:
        """Check that the disk has room for a file of this many bytes, and something to spare.

        Raises:
            StorageError: it has not.
        """
        with _problems(self._folder):
            free = shutil.disk_usage(self._folder).free
        if size + SPARE > free:
            raise StorageError(f"the disk has no room for {size} bytes more", hint="Make room on the server's disk.")

    def get(self, id: str, owner: str) -> FileRecord:
        """Return a file.

        Raises:
            UnknownFileError: the owner has no such file.
        """
        rows = self._database.rows("SELECT record FROM files WHERE id = ? AND owner = ?", (id, owner))
        if not rows:
            raise UnknownFileError(f"there is no file {id[:128]!r}", hint="Upload it first.")
        return msgspec.json.decode(rows[0][0], type=FileRecord)

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Page[FileRecord]:
        """Return an owner's files, the newest first, from the one after `after`, and whether there are more.

        Raises:
            UnknownFileError: the owner has no file `after`.
        """
        where, values = "owner = ?", [owner]
        if after is not None:
            self.get(after, owner)
            where += f" AND number {'<' if order == 'desc' else '>'} (SELECT number FROM files WHERE id = ?)"
            values.append(after)
        if purpose is not None:
            where += " AND purpose = ?"
            values.append(purpose)
        query = f"SELECT record FROM files WHERE {where} ORDER BY number {order} LIMIT ?"
        rows = self._database.rows(query, (*values, limit + 1))
        return [msgspec.json.decode(row[0], type=FileRecord) for row in rows[:limit]], len(rows) > limit

    def path(self, id: str) -> Path:
        """Return where a file's content is.

        Raises:
            UnknownFileError: it is gone.
        """
        path = self._path(id)
        if not path.is_file():
            raise UnknownFileError(f"the content of the file {id[:128]!r} is gone", hint="Upload it again.")
        return path

    def delete(self, id: str, owner: str) -> None:
        """Remove a file.

        Raises:
            UnknownFileError: the owner has no such file.
            StorageError: it cannot be removed.
        """
        self.get(id, owner)
        self._forget(id)
        with _problems(self._folder), suppress(FileNotFoundError):
            shutil.rmtree(self._folder / id)

    def total_bytes(self, owner: str) -> int:
        """Return the size of all files of an owner."""
        query = "SELECT coalesce(sum(bytes), 0) FROM files WHERE owner = ?"
        return self._database.rows(query, (owner,))[0][0]

    def _path(self, id: str) -> Path:
        return self._folder / id / CONTENT

    def _records(self) -> Sequence[FileRecord]:
        return [msgspec.json.decode(row[0], type=FileRecord) for row in self._database.rows("SELECT record FROM files")]

    def _forget(self, id: str) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM files WHERE id = ?", (id,))


def plain_name(filename: str) -> str:
    """Return a client's name of a file without folders and unprintable characters, short enough for a disk."""
    name = "".join(c for c in re.split(r"[/\\]", filename)[-1] if c.isprintable()).strip()
    stem, dot, suffix = name.rpartition(".")
    if len(name.encode()) > MAX_FILENAME:  # the suffix says what the file is
        suffix = suffix[:20] if dot else ""
        stem = (stem or name).encode()[: MAX_FILENAME - 100].decode(errors="ignore")
        name = f"{stem}.{suffix}" if suffix else stem
    return name if name.strip(".") else "file"


@contextmanager
def _problems(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "Make room on the disk." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(f"{folder} cannot be changed: {error.strerror}", hint=hint) from error
