"""The SQLite database of a live server: what is listed of its files and jobs."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loradeck.errors import BusyError, StorageError

VERSION = 1  # of the schema, in the database's user_version
WAIT = 5.0  # seconds for another process to close the database

# What is listed is a row; all else of a record is its JSON, which the record's type reads and checks. The numbers are
# never used again, so a page that begins after one means the same whatever was removed.
SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, record TEXT NOT NULL
);
CREATE INDEX files_of ON files (owner, number);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, status TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX jobs_of ON jobs (owner, number);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, step INTEGER, record TEXT NOT NULL
);
CREATE INDEX events_of ON events (job, number);
CREATE TABLE checkpoints (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, step INTEGER NOT NULL, record TEXT NOT NULL,
    UNIQUE (job, step)
);
"""


class Database:
    """A file of SQLite, in WAL mode, that one process has for itself. Thread-safe: transactions take turns."""

    def __init__(self, path: Path) -> None:
        """Open the database, and create it if it is not there.

        Raises:
            StorageError: it is damaged, another server uses it, a later version wrote it, or the disk refuses it.
        """
        self.path = path
        self._lock = threading.RLock()
        with self._problems():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._connection.close()
                raise

    @contextmanager
    def transaction(self, *, sync: bool = True) -> Iterator[sqlite3.Connection]:
        """Yield the connection; on exit all that was done is committed, and after an exception none of it.

        Args:
            sync: Wait until the disk has it. Without, a kill of the process loses nothing, but a power cut may take
                the last transactions away.

        Raises:
            StorageError: the database cannot be read or written, such as on a full disk.
        """
        with self._lock, self._problems():
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if sync else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a query.

        Raises:
            StorageError: the database cannot be read.
        """
        with self._lock, self._problems():
            return self._connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the database; whoever uses it afterwards gets a BusyError."""
        with self._lock:
            self._connection.close()

    def _open(self) -> None:
        connection = self._connection
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # two servers would both do each job
        connection.execute("PRAGMA journal_mode = WAL")
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise StorageError(
                f"{self.path} was written by another version of loradeck (schema {version}, not {VERSION})",
                hint="Use that version, or another folder.",
            )
        connection.execute("BEGIN EXCLUSIVE")  # takes the lock, also of a database that needs no change
        if not version:
            for statement in SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")

    @contextmanager
    def _problems(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path} cannot be opened: {error.strerror}") from error
        except sqlite3.ProgrammingError as error:
            raise BusyError("the server is shutting down", retry_after=1) from error  # the database is closed
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                hint = "Stop that server, or use another folder."
                raise StorageError(f"another server uses {self.path}", hint=hint) from error
            hint = "Make room on the disk." if "full" in str(error) else ""
            raise StorageError(f"{self.path} cannot be read or written: {error}", hint=hint) from error
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"{self.path} is damaged: {error}",
                hint="Restore it from a backup, or remove it and the files beside it to begin without files and jobs.",
            ) from error
