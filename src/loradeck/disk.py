"""Writes that a kill -9 cannot tear: a file or a folder is the old one or the new one. And where a cache lies."""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

UMASK = Lock()
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def cache_folder() -> Path:
    """Return where what can be made again is kept: `$LORADECK_CACHE`, or the user's own cache folder."""
    import platformdirs

    own = os.environ.get("LORADECK_CACHE")
    return Path(own).expanduser() if own else platformdirs.user_cache_path("loradeck", appauthor=False)


def write_file(path: Path, content: bytes) -> None:
    """Replace the file at `path` by `content`, atomically."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving, it takes the place of `path` in one step.

    Files of other people in an older folder at `path` are carried over; only files written anew are replaced.
    If the block raises, or the process is killed, `path` is what it was.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        fresh.chmod(0o777 & ~_umask())
        yield fresh
        for file in fresh.rglob("*"):
            _sync(file)
        if path.exists():
            _carry_over(path, fresh)
            _sync(fresh)
            _exchange(fresh, path)
        else:
            _sync(fresh)
            fresh.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(
            fresh, ignore_errors=True
        )  # the older folder after an exchange, the unfinished one after an error


def _carry_over(old: Path, fresh: Path) -> None:
    for entry in old.iterdir():
        target = fresh / entry.name
        if target.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(entry, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a filesystem without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(fresh: Path, path: Path) -> None:
    """Swap two folders in one step where the system can (Linux: renameat2(2)), else in two renames."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        rename = getattr(libc, "renameat2", None)
        if rename and rename(AT_FDCWD, os.fsencode(fresh), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE) == 0:
            return
        if rename and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    aside = fresh.with_name(fresh.name + ".old")
    path.rename(aside)
    fresh.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    with UMASK:  # it is the process's, and read by setting it: two threads at once would leave it at 0
        mask = os.umask(0)
        os.umask(mask)
    return mask
