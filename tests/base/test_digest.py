import hashlib
import os
import time
from pathlib import Path

import pytest

from loradeck.base import digest
from loradeck.base.digest import DigestCache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr(digest, "SETTLED", -1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    seen: list[Path] = []
    sha256 = digest.sha256
    monkeypatch.setattr(digest, "sha256", lambda path: (seen.append(path), sha256(path))[1])
    return seen


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_read_once(file: Path, tmp_path: Path, reads: list[Path]) -> None:
    for _ in range(2):
        assert DigestCache(tmp_path / "digests.json").of(file) == sha256(b"one")
    assert reads == [file]


@pytest.mark.usefixtures("settled")
def test_new_content_is_noticed_even_with_the_old_size_and_mtime(file: Path, tmp_path: Path) -> None:
    before = file.stat()
    assert DigestCache(tmp_path / "digests.json").of(file) == sha256(b"one")
    time.sleep(0.05)  # the file system's clock ticks every few milliseconds
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert DigestCache(tmp_path / "digests.json").of(file) == sha256(b"two")
    time.sleep(0.05)
    (tmp_path / "other").write_bytes(b"abc")
    (tmp_path / "other").rename(file)
    assert DigestCache(tmp_path / "digests.json").of(file) == sha256(b"abc")


def test_the_digest_of_a_file_just_written_is_not_cached(file: Path, tmp_path: Path, reads: list[Path]) -> None:
    for _ in range(2):
        DigestCache(tmp_path / "digests.json").of(file)
    assert reads == [file, file]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", [b"", b"no json", b'{"a": 1}', b"\xff"])
def test_a_damaged_cache_is_replaced(file: Path, tmp_path: Path, content: bytes, reads: list[Path]) -> None:
    path = tmp_path / "digests.json"
    path.write_bytes(content)
    for _ in range(2):
        assert DigestCache(path).of(file) == sha256(b"one")
    assert reads == [file]


@pytest.mark.usefixtures("settled")
def test_without_a_writable_cache_the_file_is_read_each_time(file: Path, tmp_path: Path, reads: list[Path]) -> None:
    for _ in range(2):
        assert DigestCache(tmp_path / "nowhere" / "digests.json").of(file) == sha256(b"one")
    assert reads == [file, file]
