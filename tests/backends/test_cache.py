"""The cache that processes share: bounded, whole folders only, and nothing that is held is removed."""

import errno
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.backends import cache as module
from loradeck.backends.cache import Cache, Held
from loradeck.errors import AdapterError, StorageError


def is_root() -> bool:
    return os.name == "posix" and os.geteuid() == 0


def key(number: int) -> str:
    return f"{number:064x}"[::-1]  # the first digits differ


def filling(size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / "file").write_bytes(b"x" * size)


def unused(folder: Path) -> None:
    raise AssertionError("it is there already")


def names(cache: Cache) -> set[str]:
    return {path.name.rpartition("-")[0] for path in cache.folder.glob("*-*")}


def add(cache: Cache, number: int, size: int = 100) -> None:
    """Add a folder that nobody holds, used after all before it."""
    path = cache.add(key(number), size, filling(size)).path
    os.utime(path, (number, number))


@pytest.fixture
def cache_300(tmp_path: Path) -> Cache:
    return Cache.of(tmp_path / "shared", 300)


def test_what_is_there_is_not_filled_again(cache_300: Cache) -> None:
    held = cache_300.add(key(1), 100, filling(100))
    assert cache_300.add(key(1), 100, unused).path == held.path
    assert (held.path / "file").read_bytes() == b"x" * 100
    assert cache_300.get(key(2), 100) is None


def test_used_longest_ago_goes_first(cache_300: Cache) -> None:
    for number in (1, 2, 3):
        add(cache_300, number)
    cache_300.get(key(1), 100)  # used now
    add(cache_300, 4)
    assert names(cache_300) == {key(1), key(3), key(4)}
    add(cache_300, 5, 250)
    assert names(cache_300) == {key(5)}


def test_what_is_held_stays_even_beyond_the_bound(cache_300: Cache) -> None:
    held = [cache_300.add(key(number), 100, filling(100)) for number in range(1, 6)]
    assert names(cache_300) == {key(number) for number in range(1, 6)}
    held.pop(0)
    add(cache_300, 6)
    assert key(1) not in names(cache_300)
    assert all((each.path / "file").stat().st_size == 100 for each in held)


def test_held_twice_it_stays_until_both_are_gone(cache_300: Cache) -> None:
    first, second = cache_300.add(key(1), 100, filling(100)), cache_300.get(key(1), 100)
    del first
    add(cache_300, 2, 300)
    assert key(1) in names(cache_300)
    del second
    add(cache_300, 3, 300)
    assert key(1) not in names(cache_300)


HOLD = """
import sys
from pathlib import Path
from loradeck.backends.cache import Cache
held = Cache.of(Path(sys.argv[1]), 300).get(sys.argv[2], 100)
print(held.path.name, flush=True)
sys.stdin.readline()
"""


def holder(cache: Cache, number: int) -> subprocess.Popen[str]:
    """Start a process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(cache.folder), key(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{key(number)}-100\n"
    return process


def test_what_another_process_holds_stays_until_it_is_killed(cache_300: Cache) -> None:
    add(cache_300, 1)
    gc.collect()
    process = holder(cache_300, 1)
    add(cache_300, 2, 300)
    assert key(1) in names(cache_300)
    process.kill()
    process.communicate()
    add(cache_300, 3, 300)
    assert names(cache_300) == {key(3)}


FORK = """
import os, sys
from pathlib import Path
from loradeck.backends.cache import Cache
cache = Cache.of(Path(sys.argv[1]), 300)
held = cache.get(sys.argv[2], 100)
if os.fork():
    os._exit(0)
cache.get("0" * 64, 1), cache.get(sys.argv[2], 100)  # the child takes part, so it has locks of its own
print("holds", flush=True)
sys.stdin.readline()
"""


def test_a_fork_keeps_what_it_holds(cache_300: Cache) -> None:
    add(cache_300, 1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", FORK, str(cache_300.folder), key(1)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.wait() == 0  # the parent is gone
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    add(cache_300, 2, 300)
    assert key(1) in names(cache_300)
    process.stdin.close()  # the child ends
    assert process.stdout.read() == ""
    process.stdout.close()
    add(cache_300, 3, 300)
    assert key(1) not in names(cache_300)


def test_threads_that_read_and_add_more_than_there_is_room_for(cache_300: Cache) -> None:
    problems: list[str] = []

    def work(seed: int) -> None:
        for step in range(200):
            number = (seed * 7 + step) % 10
            held = cache_300.add(key(number), 100, filling(100))
            if (held.path / "file").stat().st_size != 100:
                problems.append(f"{number} is not whole")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    add(cache_300, 11)
    assert len(names(cache_300)) <= 3


READ = """
import sys
from pathlib import Path
from loradeck.backends.cache import Cache
cache = Cache.of(Path(sys.argv[1]), 300)
for step in range(300):
    number = (int(sys.argv[2]) * 7 + step) % 10
    held = cache.add(f"{number:064x}"[::-1], 100, lambda folder: (folder / "file").write_bytes(b"x" * 100))
    assert (held.path / "file").read_bytes() == b"x" * 100
"""


def test_processes_that_read_and_add_more_than_there_is_room_for(cache_300: Cache) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READ, str(cache_300.folder)]
    processes = [subprocess.Popen([*command, f"{seed}"], env=environment) for seed in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    add(cache_300, 11)
    assert len(names(cache_300)) <= 3
    assert not [*cache_300.folder.glob(".old-*"), *cache_300.folder.glob(".new-*")]


def test_threads_that_want_the_same_fill_it_once(cache_300: Cache) -> None:
    fills: list[int] = []
    barrier = threading.Barrier(4)

    def fill(folder: Path) -> None:
        fills.append(1)
        filling(100)(folder)

    def want() -> None:
        barrier.wait()
        cache_300.add(key(1), 100, fill)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fills == [1]


def test_a_fill_that_fails_leaves_nothing(cache_300: Cache) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_bytes(b"a part")
        raise AdapterError("cut off")

    with pytest.raises(AdapterError, match="cut off"):
        cache_300.add(key(1), 100, fail)
    assert [path.name for path in cache_300.folder.iterdir() if path.name != ".lock"] == []


def test_another_process_that_is_quicker_is_no_fault(cache_300: Cache) -> None:
    def fill(folder: Path) -> None:
        filling(100)(folder)
        other: list[Held] = [cache_300.add(key(1), 100, filling(100))]
        del other

    assert (cache_300.add(key(1), 100, fill).path / "file").stat().st_size == 100


def test_on_a_full_disk_all_that_is_idle_makes_room(cache_300: Cache) -> None:
    add(cache_300, 1)
    attempts: list[int] = []

    def fill(folder: Path) -> None:
        attempts.append(1)
        if key(1) in names(cache_300):
            raise OSError(errno.ENOSPC, "No space left on device")
        filling(100)(folder)

    assert cache_300.add(key(2), 100, fill).path.is_dir()
    assert (len(attempts), names(cache_300)) == (2, {key(2)})


def test_a_full_disk_is_told(cache_300: Cache) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"cache folder .* is full: No space left on device\n.*LORADECK_CACHE"):
        cache_300.add(key(1), 100, fill)


@pytest.mark.skipif(not is_root(), reason="only root can mount a small disk")
def test_on_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no disk can be mounted here: {mount.stderr.strip()}")
    try:
        cache = Cache(disk, 1 << 30)
        add(cache, 1, 100_000)
        held = cache.add(key(2), 100_000, filling(100_000))
        add(cache, 3, 100_000)  # in the place of the first
        assert names(cache) == {key(2), key(3)}
        with pytest.raises(StorageError, match="is full: No space left on device"):
            cache.add(key(4), 200_000, filling(200_000))  # beside what is held there is no room
        assert names(cache) == {key(2)}
        assert (held.path / "file").stat().st_size == 100_000
        add(cache, 5, 100_000)
        del held
        gc.collect()
        assert cache._file is not None
        os.close(cache._file)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "cache", Path("/proc/nothing")):
        with pytest.raises(StorageError, match=r"cache folder .* cannot be written: .*\n.*LORADECK_CACHE"):
            Cache(folder, 100).add(key(1), 100, filling(100))


def test_what_kills_left_is_removed_after_an_hour(cache_300: Cache) -> None:
    add(cache_300, 1)
    for name, age in ((".new-x", 2 * module.FORGOTTEN), (".old-y", 2 * module.FORGOTTEN), (".new-z", 0)):
        folder = cache_300.folder / name
        folder.mkdir()
        (folder / "file").touch()
        for path in (folder / "file", folder):
            os.utime(path, (time.time() - age,) * 2)
    add(cache_300, 2)
    assert [path.name for path in cache_300.folder.glob(".[no]*")] == [".new-z"]
