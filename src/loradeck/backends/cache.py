"""Folders of files that can be downloaded again, by their content, in a folder that many processes share.

A folder appears whole, by a rename, and does not change. When the bound is reached, those used longest ago are removed,
but none that a process holds: it has a lock on one byte of the file LOCK, whose position is the folder's key. The
system drops the locks of a process that ends.
"""

import errno
import fcntl
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import ClassVar

from loradeck.errors import StorageError

LOCK = ".lock"
NEW, OLD = ".new-", ".old-"  # how the names of folders begin that are being written, or removed
FORGOTTEN = 3600  # seconds without a change, after which such a folder is what a kill left
FULL, THERE = {errno.ENOSPC, errno.EDQUOT}, {errno.ENOTEMPTY, errno.EEXIST}
HINT = "Free some space there, or name another folder: LORADECK_CACHE."


class Hold:
    """Keeps a folder in the cache for as long as this object lives."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True)
class Held:
    """A folder of the cache."""

    path: Path
    hold: Hold = field(repr=False)


class Cache:
    """A folder of folders. Any number of threads and processes may use it."""

    opened: ClassVar[dict[Path, "Cache"]] = {}

    def __init__(self, folder: Path, most: int) -> None:
        """Use `Cache.of`: closing a second LOCK file of this process would drop its locks."""
        self.folder = folder
        self.most = most
        self._mutex = threading.Lock()
        self._holds: Counter[str] = Counter()
        self._released: deque[str] = deque()
        self._filling: weakref.WeakValueDictionary[str, threading.RLock] = weakref.WeakValueDictionary()
        self._process = os.getpid()
        self._file: int | None = None

    @classmethod
    def of(cls, folder: Path, most: int) -> "Cache":
        """Return this process's cache in a folder, with a bound of `most` bytes from now on."""
        cache = cls.opened.setdefault(folder, cls(folder, most))
        cache.most = most
        return cache

    def get(self, key: str, nbytes: int) -> Held | None:
        """Return a folder, and keep it while it is held; None if it is not there.

        Raises:
            StorageError: the cache's folder cannot be written.
        """
        name = f"{key}-{nbytes}"
        path = self.folder / name
        if not path.is_dir():  # without a lock: there may be no cache yet
            return None
        with self._cannot(), self._locked() as lock_file:
            if not self._holds[name]:
                fcntl.lockf(lock_file, fcntl.LOCK_SH, 1, _byte(name))
            self._holds[name] += 1
        hold = Hold()
        weakref.finalize(hold, self._release, name).atexit = False
        if not path.is_dir():  # removed just before
            return None
        with suppress(OSError):
            os.utime(path)  # when it was last used
        return Held(path, hold)

    def add(self, key: str, nbytes: int, fill: Callable[[Path], object]) -> Held:
        """Return the folder of a key, which `fill` writes if it is not there.

        Raises:
            StorageError: the cache's folder is full, or cannot be written.
        """
        self._notice_fork()
        with self._mutex:
            filling = self._filling.setdefault(key, threading.RLock())
        with filling:  # of the threads that want it, one fills it; another process may do so too
            while (held := self.get(key, nbytes)) is None:
                with self._cannot():
                    self._add(f"{key}-{nbytes}", nbytes, fill)
        return held

    def _add(self, name: str, nbytes: int, fill: Callable[[Path], object]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._trim(nbytes)
        try:
            self._write(name, fill)
        except OSError as error:
            if error.errno not in FULL or not self._trim(self.most):  # other files may fill the same disk
                raise
            self._write(name, fill)

    def discard(self, held: Held) -> None:
        """Remove a folder that is damaged, whoever holds it.

        Raises:
            StorageError: the cache's folder cannot be written.
        """
        old = held.path.with_name(f"{OLD}{held.path.name}-{token_hex(4)}")
        with self._cannot():
            with suppress(FileNotFoundError):  # another process was quicker
                held.path.rename(old)
            shutil.rmtree(old, ignore_errors=True)

    def _write(self, name: str, fill: Callable[[Path], object]) -> None:
        new = Path(tempfile.mkdtemp(prefix=NEW, dir=self.folder))
        try:
            fill(new)
            if not (self.folder / name).exists():
                new.rename(self.folder / name)
        except OSError as error:
            if error.errno not in THERE:  # another process was quicker
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)

    # ---- removing

    def _trim(self, room: int) -> int:
        """Remove the folders used longest ago until there is room for so many bytes; return how many were removed."""
        folders: list[tuple[float, int, str]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError, ValueError):  # removed by another process, or none of the cache
                    if entry.name.startswith((NEW, OLD)):
                        _forget(Path(entry.path))
                    elif entry.name != LOCK:
                        folders.append((entry.stat().st_mtime, int(entry.name.rpartition("-")[2]), entry.name))
        excess = sum(nbytes for _, nbytes, _ in folders) + room - self.most
        removed = 0
        for _, nbytes, name in sorted(folders):
            if excess <= 0:
                break
            if self._remove(name):
                excess -= nbytes
                removed += 1
        return removed

    def _remove(self, name: str) -> bool:
        """Remove a folder unless it is held: in one rename, so that nobody sees a part of it."""
        old = self.folder / f"{OLD}{name}-{token_hex(4)}"
        with self._locked() as lock_file:
            if self._holds[name]:
                return False
            try:
                fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(name))
            except (BlockingIOError, PermissionError):  # POSIX allows either
                return False
            try:
                (self.folder / name).rename(old)
            except FileNotFoundError:  # another process was quicker
                return False
            finally:
                fcntl.lockf(lock_file, fcntl.LOCK_UN, 1, _byte(name))
        shutil.rmtree(old, ignore_errors=True)
        return True

    # ---- locks

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Keep other threads out, and yield the descriptor of the LOCK file, for locks against other processes."""
        self._notice_fork()
        with self._mutex:
            self._settle()
            yield self._descriptor()
            self._settle()

    def _notice_fork(self) -> None:
        """Take the locks again in a process that was forked: it has the descriptor, but not the locks."""
        if self._process == os.getpid():
            return
        self._process, self._mutex = os.getpid(), threading.Lock()  # a thread of the parent may have had the mutex
        for name in self._holds:
            fcntl.lockf(self._descriptor(), fcntl.LOCK_SH, 1, _byte(name))

    def _release(self, name: str) -> None:
        """Note that a hold has ended. The garbage collector may call this at any place of any thread."""
        self._released.append(name)
        if self._process == os.getpid() and self._mutex.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._mutex.release()

    def _settle(self) -> None:
        while self._released:
            name = self._released.popleft()
            self._holds[name] -= 1
            if not self._holds[name]:
                del self._holds[name]
                fcntl.lockf(self._descriptor(), fcntl.LOCK_UN, 1, _byte(name))

    def _descriptor(self) -> int:
        if self._file is None:
            self._file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._file

    @contextmanager
    def _cannot(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = "is full" if error.errno in FULL else "cannot be written"
            raise StorageError(f"the cache folder {self.folder} {why}: {error.strerror}", hint=HINT) from error


def _byte(name: str) -> int:
    return int(name[:15], 16)


def _forget(folder: Path) -> None:
    """Remove a folder that nobody writes any more."""
    if max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) < time.time() - FORGOTTEN:
        shutil.rmtree(folder, ignore_errors=True)
