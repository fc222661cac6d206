"""Atomic writes: after a kill -9, a file or folder is the old one or the new one. Also the cache folder, reading the
start of a file, and stamps of folders."""

import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TypeAlias

UMASK = Lock()
NO_WAITING = getattr(os, "O_NONBLOCK", 0)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
SETTLED = 1_000_000_000  # ns; files written twice within a tick of the file system's clock look unchanged

Stamp: TypeAlias = tuple[tuple[str, int, int, int, int], ...]  # of each file: name, bytes, mtime_ns, ctime_ns, inode


def cache_folder() -> Path:
    """Return the folder for files that can be made again: `$LORADECK_CACHE`, or the user's cache folder."""
    import platformdirs

    folder = os.environ.get("LORADECK_CACHE")
    return Path(folder).expanduser() if folder else platformdirs.user_cache_path("loradeck", appauthor=False)


def read_start(path: Path, most: int) -> tuple[bytes, os.stat_result]:
    """Return the first `most` bytes of a file, and its status. In a few calls: listings read thousands of files.

    Raises:
        OSError: it cannot be read, or is no regular file; a pipe is not waited for.
    """
    handle = os.open(path, os.O_RDONLY | NO_WAITING)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a file")
        content = os.read(handle, most)
        while len(content) < min(most, status.st_size) and (more := os.read(handle, most - len(content))):
            content += more
    finally:
        os.close(handle)
    return content, status


def stamp_of(folder: str | Path, suffixes: tuple[str, ...]) -> Stamp:
    """Return a value that changes whenever a file in a folder does whose name ends with one of the suffixes.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        files = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(suffixes) and entry.is_file()]
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in files))


def is_settled(stamp: Stamp) -> bool:
    """Return whether files with this stamp cannot change any more without another stamp."""
    return all(time.time_ns() - max(mtime, ctime) > SETTLED for _, _, mtime, ctime, _ in stamp)


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to the file at `path`, atomically."""
    with new_file(path) as new:
        new.write_bytes(content)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield an empty file to write to; on exit it replaces `path` atomically.

    If the block raises, or the process is killed, `path` stays as it was.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    new = Path(name)
    try:
        yield new
        _sync(new)
        new.chmod(0o666 & ~_umask())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on exit it replaces `path` atomically.

    Files of an older folder at `path` that were not written again are carried over. If the block raises, or the
    process is killed, `path` stays as it was.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new.chmod(0o777 & ~_umask())
        yield new
        mask = _umask()
        for file in new.rglob("*"):
            if not file.is_symlink():  # some libraries make files that only their owner may read
                file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
            _sync(file)
        if path.exists():
            _carry_over(path, new)
            _sync(new)
            _exchange(new, path)
        else:
            _sync(new)
            new.rename(path)
        _sync(path.parent)
    finally:
        # After an exchange this is the older folder, after an error the unfinished one.
        shutil.rmtree(new, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    for source in old.iterdir():
        target = new / source.name
        if target.exists():
            continue
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True, copy_function=_link)
        else:
            _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a filesystem without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(new: Path, path: Path) -> None:
    """Swap two folders, atomically on Linux (renameat2(2)), elsewhere in two renames."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        rename = getattr(libc, "renameat2", None)
        if rename and rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE) == 0:
            return
        if rename and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    old = new.with_name(new.name + ".old")
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    with UMASK:  # reading the process's umask means setting it: two threads at once would leave it at 0
        mask = os.umask(0)
        os.umask(mask)
    return mask
