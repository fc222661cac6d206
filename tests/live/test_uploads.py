"""Uploaded files: what is half is gone, an owner sees their own, and limits."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from loradeck.errors import DataError, FileTooLargeError, StorageError, UnknownFileError
from loradeck.live import uploads as module
from loradeck.live.database import Database
from loradeck.live.records import FileRecord
from loradeck.live.uploads import Upload, Uploads, plain_name


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "live.sqlite")
    yield database
    database.close()


@pytest.fixture
def uploads(database: Database, tmp_path: Path) -> Uploads:
    return Uploads(database, tmp_path / "files")


def put(uploads: Uploads, owner: str = "", content: bytes = b"abc", name: str = "a.jsonl") -> FileRecord:
    with uploads.upload(owner, name, "fine-tune") as upload:
        for start in range(0, len(content), 2):
            upload.write(content[start : start + 2])
    return upload.record


def test_a_file_comes_back_after_a_restart(database: Database, tmp_path: Path, uploads: Uploads) -> None:
    record = put(uploads, "alice", b"hello\n", "poems.jsonl")
    assert (record.filename, record.bytes, record.owner, record.purpose) == ("poems.jsonl", 6, "alice", "fine-tune")
    assert record.sha256 == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert record.id.startswith("file-")
    assert len(record.id) == 29
    again = Uploads(database, tmp_path / "files")
    assert again.get(record.id, "alice") == record
    assert again.path(record.id).read_bytes() == b"hello\n"


def test_one_whose_content_is_gone_can_still_be_deleted(uploads: Uploads) -> None:
    record = put(uploads)
    shutil.rmtree(uploads.path(record.id).parent)
    with pytest.raises(UnknownFileError, match="content of the file"):
        uploads.path(record.id)
    uploads.delete(record.id, "")
    assert uploads.list("") == ([], False)


def test_an_owner_sees_their_own(uploads: Uploads) -> None:
    record = put(uploads, "alice")
    for call in (uploads.get, uploads.delete):
        with pytest.raises(UnknownFileError, match=record.id):
            call(record.id, "bob")
    with pytest.raises(UnknownFileError):
        uploads.list("bob", after=record.id)
    assert uploads.list("bob") == ([], False)
    assert uploads.total_bytes("bob") == 0
    assert uploads.get(record.id, "alice") == record


def test_pages_are_newest_first(uploads: Uploads) -> None:
    files = [put(uploads, name=f"{number}.jsonl") for number in range(5)]
    assert uploads.list("") == (files[::-1], False)
    assert uploads.list("", order="asc", limit=2) == (files[:2], True)
    assert uploads.list("", after=files[3].id, limit=3) == (files[2::-1], False)
    assert uploads.list("", order="asc", after=files[3].id) == (files[4:], False)
    assert uploads.list("", purpose="fine-tune-results") == ([], False)
    uploads.delete(files[4].id, "")
    assert uploads.list("", limit=1) == ([files[3]], True)


def test_a_deleted_file_is_gone(uploads: Uploads, tmp_path: Path) -> None:
    record = put(uploads)
    uploads.delete(record.id, "")
    assert [*(tmp_path / "files").iterdir()] == []
    with pytest.raises(UnknownFileError):
        uploads.delete(record.id, "")
    assert uploads.total_bytes("") == 0


def test_an_upload_that_fails_leaves_nothing(uploads: Uploads, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), uploads.upload("", "a", "fine-tune") as upload:
        upload.write(b"abc" * (1 // (upload.bytes)))
    assert [*(tmp_path / "files").iterdir()] == []
    assert uploads.list("") == ([], False)


def test_an_upload_that_is_killed_leaves_nothing(database: Database, tmp_path: Path) -> None:
    database.close()
    code = f"""
import os, signal
from pathlib import Path
from loradeck.live.database import Database
from loradeck.live.uploads import Uploads
folder = Path({str(tmp_path)!r})
uploads = Uploads(Database(folder / "live.sqlite"), folder / "files")
with uploads.upload("", "whole", "fine-tune") as upload:
    upload.write(b"whole")
with uploads.upload("", "half", "fine-tune") as upload:
    upload.write(b"half" * 100_000)
    assert len(list((folder / "files").iterdir())) == 2
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == -signal.SIGKILL
    again = Database(tmp_path / "live.sqlite")
    uploads = Uploads(again, tmp_path / "files")
    files, _ = uploads.list("")
    assert [record.filename for record in files] == ["whole"]
    assert [path.name for path in (tmp_path / "files").iterdir()] == [files[0].id]
    again.close()


def test_rows_without_files_and_files_without_rows_are_gone(
    database: Database, tmp_path: Path, uploads: Uploads, caplog: pytest.LogCaptureFixture
) -> None:
    kept, lost = put(uploads), put(uploads)
    shutil.rmtree(uploads.path(lost.id).parent)
    (tmp_path / "files" / "file-of-no-row").mkdir()
    again = Uploads(database, tmp_path / "files")
    assert again.list("") == ([kept], False)
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.id]
    assert f"the content of the file {lost.id} is gone" in caplog.text


def test_an_empty_file_is_refused(uploads: Uploads, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'a\.jsonl' is empty"):
        put(uploads, content=b"")
    assert [*(tmp_path / "files").iterdir()] == []


def test_the_size_of_a_file_and_of_all_is_bounded(uploads: Uploads, tmp_path: Path) -> None:
    with (
        pytest.raises(FileTooLargeError, match=r"'a' is larger than 4 bytes"),
        uploads.upload("", "a", "", max_bytes=4) as upload,
    ):
        upload.write(b"12345")
    with uploads.upload("bob", "a", "", max_bytes=4, max_total=6) as upload:
        upload.write(b"1234")
    with (
        pytest.raises(FileTooLargeError, match=r"more than 6 bytes .* there are 4 already") as error,
        uploads.upload("bob", "b", "", max_bytes=4, max_total=6) as upload,
    ):
        upload.write(b"123")
    assert "Delete" in error.value.hint
    with uploads.upload("alice", "b", "", max_total=6) as upload:  # another owner
        upload.write(b"123")
    assert len([*(tmp_path / "files").iterdir()]) == 2


def test_two_uploads_at_once_share_the_bound(uploads: Uploads) -> None:
    with ExitStack() as first, uploads.upload("", "b", "", max_total=6) as second:
        first.enter_context(uploads.upload("", "a", "", max_total=6)).write(b"1234")
        second.write(b"1234")
        end_first = first.pop_all()
    with pytest.raises(FileTooLargeError, match="there are 4 already"):
        end_first.close()
    assert uploads.list("") == ([second.record], False)


def test_threads_upload_at_once(uploads: Uploads) -> None:
    start = threading.Barrier(4)
    done: list[FileRecord] = []

    def upload(owner: str) -> None:
        start.wait()
        done.extend(put(uploads, owner, owner.encode() * 1000) for _ in range(10))

    threads = [threading.Thread(target=upload, args=(owner,)) for owner in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 40
    for owner in "abcd":
        files, _ = uploads.list(owner)
        assert len(files) == 10
        assert all(uploads.path(file.id).read_bytes() == owner.encode() * 1000 for file in files)


def test_a_full_disk_is_seen_before_and_during_an_upload(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=module.SPARE + 10))
    uploads.check_room(10)
    with pytest.raises(StorageError, match="no room for 11 bytes"):
        uploads.check_room(11)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Upload, "write", Mock(side_effect=full))
    with pytest.raises(StorageError, match="No space left") as error:
        put(uploads)
    assert "room" in error.value.hint
    assert uploads.list("") == ([], False)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("poems.jsonl", "poems.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\poems.jsonl", "poems.jsonl"),
        ("..", "file"),
        ("", "file"),
        ("a\x00\n\u202eb.csv", "ab.csv"),
        ("ü" * 500 + ".jsonl", "ü" * 50 + ".jsonl"),
        ("x." + "y" * 500, "x." + "y" * 20),
    ],
)
def test_names_are_plain(given: str, plain: str) -> None:
    assert plain_name(given) == plain
