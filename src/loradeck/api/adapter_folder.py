"""An adapter's folder while it is uploaded: its files as a form's parts, or a zip of them, from a stranger.

Each part goes to the disk under a number, never under a name of the client's. What is no adapter's own file, such as
the state of an optimizer or a pickle, is counted and not kept. An adapter's folder may lie within others.
"""

import errno
import io
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self

from loradeck.api.errors import HttpError
from loradeck.errors import AdapterError, FileTooLargeError, shorten
from loradeck.lora.folder import CONFIG, TENSORS
from loradeck.lora.foreign import PICKLE
from loradeck.lora.hub import ADAPTER, FILES

MAX_FILES = 1000
MAX_PATH, MAX_FILENAME = 1024, 200  # characters
MAX_READ = 1 << 20  # bytes that are read of a zip at once; its list of members too is one read
ZIP = ".zip"
BROKEN = (  # what zipfile raises for a broken zip, and for one with a password
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OverflowError,
    RuntimeError,
    ValueError,
)
HINT = f"Upload a folder with {CONFIG} and {TENSORS}, as PEFT saves it, or a zip of it."


class UploadedFolder(AbstractContextManager["UploadedFolder"]):
    """The files of one upload, in a folder of this machine."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """`folder` is empty, and all of the upload's; `max_bytes` is for all files, and for what a zip holds."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._bytes = 0
        self._files: dict[str, Path | None] = {}  # by the client's path; None if it is not kept
        self._open: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, filename: str) -> Callable[[bytes], None]:
        """Begin a file, which ends the one before; return what takes its content.

        Raises:
            HttpError: 400, a path that leads out of the folder, or that came before.
        """
        self._close()
        path = checked_path(filename)
        if path in self._files:
            raise HttpError(400, f"The upload has {shorten(path, 128)} twice.", param="file")
        is_needed = path.lower().endswith(ZIP) or _is_own(PurePosixPath(path).name)
        self._files[path] = self._folder / str(len(self._files)) if is_needed else None
        file = self._files[path]
        self._open = None if file is None else file.open("xb")
        return self._write

    def finish(self, folder: Path) -> None:
        """Make a folder of the adapter's own files.

        Raises:
            HttpError: 400, a zip beside other files, or a path that leads out of it; 413, the zip holds too much.
            AdapterError: there is no adapter in it, or several are, or the zip cannot be read.
        """
        self._close()
        folder.mkdir()
        archive = next((path for path in self._files if path.lower().endswith(ZIP)), None)
        if archive is None:
            top = _top(self._files)
            for path, file in self._files.items():
                if file is not None and _parent(path) == top:
                    file.rename(folder / PurePosixPath(path).name)
            return
        if len(self._files) > 1:
            raise HttpError(400, "The upload has a zip and other files.", param="file", hint="Upload the zip alone.")
        file = self._files[archive]
        assert file is not None
        self._unpack(file, folder)
        file.unlink()

    def _write(self, content: bytes) -> None:
        self._bytes += len(content)
        if self._bytes > self._max_bytes:
            raise FileTooLargeError(f"the upload is larger than {self._max_bytes} bytes")
        if self._open is not None:
            self._open.write(content)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _unpack(self, file: Path, folder: Path) -> None:
        try:
            with _BoundedFile(file) as bounded, zipfile.ZipFile(bounded) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                for member, name in self._own_members(members):
                    with archive.open(member) as content, (folder / name).open("xb") as target:
                        shutil.copyfileobj(content, target, MAX_READ)
        except (HttpError, AdapterError, FileTooLargeError):
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:  # which is a place before the zip's beginning
                raise
            raise _unreadable(error) from error
        except BROKEN as error:
            raise _unreadable(error) from error

    def _own_members(self, members: Sequence[zipfile.ZipInfo]) -> list[tuple[zipfile.ZipInfo, str]]:
        """Return the members that are the adapter's own, with their names, once all are known to be harmless."""
        if len(members) > MAX_FILES:
            raise HttpError(413, f"The zip has more than {MAX_FILES} files.", param="file")
        size = sum(member.file_size for member in members)
        if size > self._max_bytes:
            raise FileTooLargeError(f"the zip holds {size} bytes, more than the limit of {self._max_bytes}")
        paths = [checked_path(member.filename) for member in members]
        if len({*paths}) < len(paths):
            path = next(path for at, path in enumerate(paths) if path in paths[:at])
            raise HttpError(400, f"The zip has {shorten(path, 128)} twice.", param="file")
        top = _top(paths)
        needed = []
        for member, path in zip(members, paths, strict=True):
            name = PurePosixPath(path).name
            if _parent(path) == top and _is_own(name):
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile(f"{name} is compressed in a way that is not supported")
                needed.append((member, name))
        return needed


class _BoundedFile(io.BufferedReader):
    """A file of which nobody reads much at once: a zip's list of members would be in memory whole, however long."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        rest = max(0, self._size - self.tell())
        size = rest if size is None or size < 0 else min(size, rest)
        if size > MAX_READ:
            raise zipfile.BadZipFile("its list of files is too long")
        return super().read(size)


def checked_path(filename: str) -> str:
    """Return the path of a file within the folder that a client uploads, with / between its parts.

    Raises:
        HttpError: 400, it leads out of the folder, or is no path.
    """
    path = filename.replace("\\", "/")
    parts = path.split("/")
    why = ""
    if not path or not parts[-1]:
        why = "is no name of a file"
    elif path.startswith("/") or re.match("[A-Za-z]:", path):
        why = "is absolute"
    elif ".." in parts:
        why = "leads out of the folder"
    elif len(path) > MAX_PATH or len(parts[-1]) > MAX_FILENAME:
        why = "is too long"
    elif not path.isprintable():
        why = "has unprintable characters"
    if why:
        raise HttpError(400, f"The filename {shorten(filename, 128)} {why}.", param="file")
    return "/".join(part for part in parts if part not in ("", "."))


def _is_own(name: str) -> bool:
    """Return whether a file of this name may be an adapter's own."""
    return any(fnmatchcase(name, pattern) for pattern in FILES)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _top(paths: Iterable[str]) -> str:
    """Return the folder of the adapter: the one whose adapter_config.json lies above all others.

    Raises:
        AdapterError: there is none, it has no tensors, or there are several.
    """
    # macOS adds folders and files of its own to a zip.
    visible = [path for path in paths if not any(part.startswith((".", "__MACOSX")) for part in path.split("/"))]
    folders = sorted((_parent(path) for path in visible if PurePosixPath(path).name == CONFIG), key=len)
    if not folders:
        shown = ", ".join(shorten(path, 60) for path in visible[:5]) + (", …" if len(visible) > 5 else "")
        raise AdapterError(f"the upload has no {CONFIG}, only {shown or 'hidden files'}", hint=HINT)
    top, *others = folders
    if not all(not top or folder.startswith(f"{top}/") for folder in others):
        shown = ", ".join(shorten(folder, 60) for folder in folders[:5]) + (", …" if len(folders) > 5 else "")
        raise AdapterError(f"the upload has several adapters, in {shown}", hint="Upload one at a time.")
    names = {PurePosixPath(path).name for path in visible if _parent(path) == top}
    if PICKLE in names and not any(fnmatchcase(name, ADAPTER[1]) for name in names):
        raise AdapterError(f"{PICKLE} is a pickle, which can run code when opened", hint="Save it as safetensors.")
    return top


def _unreadable(error: Exception) -> AdapterError:
    return AdapterError(
        f"the zip cannot be read: {str(error).strip() or type(error).__name__}"[:300], hint="Zip it again."
    )
