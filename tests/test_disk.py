"""Atomic writes: the old version or the new one, even after a real kill -9."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loradeck import disk
from loradeck.disk import new_folder, write_file

PARTS = ("a.bin", "b.bin", "deeper/c.bin")

# Writes version after version, each file holding only its version's number, and prints each version it finishes.
SAVE_FOLDERS = f"""
import sys
from pathlib import Path
from loradeck.disk import new_folder
version = int(sys.argv[2])
while True:
    version += 1
    with new_folder(Path(sys.argv[1])) as new:
        for part in {PARTS}:
            (new / part).parent.mkdir(exist_ok=True)
            (new / part).write_text(f"{{version}}\\n" * 5000)
    print(version, flush=True)
"""
SAVE_FILES = """
import sys
from pathlib import Path
from loradeck.disk import write_file
version = int(sys.argv[2])
while True:
    version += 1
    write_file(Path(sys.argv[1]), f"{version}\\n".encode() * 50000)
    print(version, flush=True)
"""


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


# ---- a file


def test_write_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in (b"old", b"new"):
        write_file(file, content)
        assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_write_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_file(tmp_path / "ours", b"")
    (tmp_path / "usual").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_write_file_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_file(file, b"old")

    def fail(handle: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_file(file, b"new")
    assert contents(tmp_path) == {"file": "old"}


# ---- a folder


def fill(folder: Path, **files: str) -> None:
    with new_folder(folder) as new:
        for name, text in files.items():
            (new / name).write_text(text)


def test_new_folder_with_its_parents(tmp_path: Path) -> None:
    fill(tmp_path / "x" / "y", one="1")
    assert contents(tmp_path) == {"x/y/one": "1"}
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "x" / "y").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_what_is_in_a_new_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    with new_folder(tmp_path / "it") as new:
        for mode in (0o600, 0o755):
            (new / f"{mode}").write_text("")
            (new / f"{mode}").chmod(mode)
        (new / "inside").mkdir(0o700)
        (new / "link").symlink_to("nowhere")
    (tmp_path / "usual").touch()
    (tmp_path / "folder").mkdir()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "it").iterdir() if not path.is_symlink()}
    assert modes.pop("inside") == (tmp_path / "folder").stat().st_mode
    assert {*modes.values()} == {(tmp_path / "usual").stat().st_mode}


def test_new_folder_does_not_appear_until_it_is_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "it") as new:
        (new / "one").write_text("1")
        assert not (tmp_path / "it").exists()
    assert contents(tmp_path) == {"it/one": "1"}


def _by_exchange(_: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")


def _by_two_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.sys, "platform", "another")


@pytest.mark.parametrize("how", [_by_exchange, _by_two_renames])
def test_new_folder_carries_over_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[pytest.MonkeyPatch], None]
) -> None:
    how(monkeypatch)
    fill(tmp_path / "it", one="1", two="2")
    (tmp_path / "it" / "notes").mkdir()
    (tmp_path / "it" / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "it" / "link").symlink_to("notes/mine.txt")
    fill(tmp_path / "it", one="new")
    assert contents(tmp_path) == {
        "it/one": "new",
        "it/two": "2",
        "it/notes/mine.txt": "mine",
        "it/link": "mine",
    }
    assert (tmp_path / "it" / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_new_folder_replaces_the_old_one_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "it", one="1")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("a moment without the folder"))
    fill(tmp_path / "it", one="new")
    assert contents(tmp_path) == {"it/one": "new"}


@pytest.mark.parametrize("old", [{}, {"one": "1"}])
def test_new_folder_that_fails_leaves_the_old_one(tmp_path: Path, old: dict[str, str]) -> None:
    if old:
        fill(tmp_path / "it", **old)
    before = contents(tmp_path)

    def stop_halfway() -> None:
        with new_folder(tmp_path / "it") as new:
            (new / "one").write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["it"] * bool(old)


def test_new_folder_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    fill(tmp_path / "real", one="1")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", one="new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {"one": "new"}


# ---- kill -9


def kill_while_saving(program: str, target: Path, last: int, delay: float) -> int:
    """Run the program, kill it some time after its first save, and return the last version it printed."""
    command = [sys.executable, "-c", program, str(target), str(last)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        lines = [first, *process.stdout]
    assert process.returncode == -signal.SIGKILL
    return int(lines[-1])


@pytest.mark.slow
def test_kill_while_saving_folders(tmp_path: Path) -> None:
    folder, last, rng = tmp_path / "it", 0, random.Random(0)
    fill(folder, notes="mine")
    for _ in range(10):
        last = kill_while_saving(SAVE_FOLDERS, folder, last, rng.uniform(0, 0.05))
        files = contents(folder)
        assert files.pop("notes") == "mine"
        assert set(files) == set(PARTS)
        version = int(files["a.bin"].partition("\n")[0])
        assert version in (last, last + 1)  # killed before the exchange, or between it and the print
        assert set(files.values()) == {f"{version}\n" * 5000}
        last = version


@pytest.mark.slow
def test_kill_while_saving_a_file(tmp_path: Path) -> None:
    file, last, rng = tmp_path / "it", 0, random.Random(0)
    for _ in range(5):
        last = kill_while_saving(SAVE_FILES, file, last, rng.uniform(0, 0.05))
        version = int(file.read_text().partition("\n")[0])
        assert version in (last, last + 1)
        assert file.read_text() == f"{version}\n" * 50000
        last = version


def test_concurrent_writes_do_not_change_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the umask means setting it."""
    umask = os.umask
    before = umask(0o022)
    umask(before)

    def slow(mask: int) -> int:
        old = umask(mask)
        time.sleep(0.005)  # lets another thread run
        return old

    monkeypatch.setattr(os, "umask", slow)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: write_file(tmp_path / str(number), b""), range(8)))
    after = umask(before)
    assert after == before
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~before}
