"""The database of a live server: transactions, threads, and what it says of damage."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loradeck.errors import BusyError, StorageError
from loradeck.live import database as module
from loradeck.live.database import Database

INSERT = "INSERT INTO checkpoints (job, step, record) VALUES (?, ?, '{}')"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "live.sqlite"


def count(database: Database) -> int:
    return database.rows("SELECT count(*) FROM checkpoints")[0][0]


def test_it_is_in_wal_mode_and_waits_for_the_disk(path: Path) -> None:
    database = Database(path)
    assert database.rows("PRAGMA journal_mode") == [("wal",)]
    with database.transaction() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    with database.transaction(sync=False) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (1,)
    database.close()


def test_a_transaction_is_all_or_nothing(path: Path) -> None:
    database = Database(path)
    with pytest.raises(StorageError, match="no such table"), database.transaction() as connection:
        connection.executemany(INSERT, [("a", 1)]).execute("SELECT * FROM none_there")
    assert count(database) == 0
    with database.transaction() as connection:
        connection.execute(INSERT, ("a", 1))
    database.close()
    database = Database(path)
    assert count(database) == 1
    database.close()


def test_threads_take_turns(path: Path) -> None:
    database = Database(path)
    start = threading.Barrier(4)

    def write(job: str) -> None:
        start.wait()
        for step in range(50):
            with database.transaction(sync=False) as connection:
                connection.execute(INSERT, (job, step))
                assert (job, step) in connection.execute("SELECT job, step FROM checkpoints").fetchall()

    threads = [threading.Thread(target=write, args=(job,)) for job in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count(database) == 200
    database.close()


def test_what_was_committed_survives_a_kill(path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from loradeck.live.database import Database
database = Database(Path({str(path)!r}))
with database.transaction(sync=False) as connection:
    connection.execute({INSERT!r}, ("a", 1))
with database.transaction() as connection:
    connection.execute({INSERT!r}, ("a", 2))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    database = Database(path)
    assert database.rows("SELECT step FROM checkpoints") == [(1,)]
    database.close()


def test_one_server_has_it_for_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0)
    database = Database(path)
    with pytest.raises(StorageError, match=r"another server uses .*live\.sqlite") as error:
        Database(path)
    assert "another folder" in error.value.hint
    with database.transaction() as connection:
        connection.execute(INSERT, ("a", 1))
    database.close()
    Database(path).close()


@pytest.mark.parametrize("damage", ["no database", "torn page"])
def test_damage_is_one_clear_error(path: Path, damage: str) -> None:
    database = Database(path)
    with database.transaction() as connection:
        for step in range(2000):
            connection.execute(INSERT, ("a", step))
    database.close()
    content = bytearray(path.read_bytes())
    if damage == "no database":
        content = bytearray(b"these are no tables" * 1000)
    else:
        content[len(content) // 2 : len(content) // 2 + 6000] = b"\xff" * 6000
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"live\.sqlite is damaged: ") as error:
        Database(path)
    assert "backup" in error.value.hint
    assert path.read_bytes() == content  # nothing was lost on top


def test_a_later_versions_is_left_alone(path: Path) -> None:
    Database(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StorageError, match=r"another version of loradeck \(schema 99"):
        Database(path)


def test_after_its_end_it_is_busy(path: Path) -> None:
    database = Database(path)
    database.close()
    with pytest.raises(BusyError, match="shutting down"):
        count(database)
    with pytest.raises(BusyError, match="shutting down"), database.transaction():
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be opened"):
        Database(tmp_path / "file" / "live.sqlite")
