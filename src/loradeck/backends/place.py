"""Files at a URL, through fsspec: listed, read and written, with retries, and with one clear error each."""

import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loradeck.backends.place_errors import CutOffError, place_error
from loradeck.errors import ConfigError, LoradeckError, StoreUnreachableError

ATTEMPTS = 5
FIRST_PAUSE = 0.2  # seconds; each pause is twice the one before
PART = 8 << 20  # bytes read at once
TIMEOUTS = {"connect_timeout": 10, "read_timeout": 30}  # seconds

T = TypeVar("T")


@dataclass(frozen=True)
class Protocol:
    """How a kind of URL is used."""

    package: str
    """What to install; "" if it comes with loradeck."""
    is_conditional: bool
    """Whether it can create a file only if there is none."""
    options: Mapping[str, Any]


PROTOCOLS = {
    "s3": Protocol("s3fs", True, {"config_kwargs": {**TIMEOUTS, "retries": {"total_max_attempts": 1}}}),
    "gs": Protocol("gcsfs", True, {}),
    "hf": Protocol("", True, {}),
    "memory": Protocol("", False, {}),
}


class Place:
    """The files below a URL. Any thread may use it; a process that was forked opens connections of its own."""

    def __init__(self, url: str) -> None:
        """`url` is one of PROTOCOLS. Nothing is asked yet.

        Raises:
            ConfigError: a package that reads such URLs is missing.
        """
        self.url = url.rstrip("/")
        self.protocol = PROTOCOLS[self.url.partition("://")[0]]
        self._opened: tuple[int, Any] = (0, None)
        self.root: str = self._files()._strip_protocol(self.url)

    @property
    def is_conditional(self) -> bool:
        """Whether `create` is one step: of two that create a file at the same time, one is told that it is there."""
        return self.protocol.is_conditional

    # ---- reading

    def list(self, folder: str) -> dict[str, int]:
        """Return the bytes of each file below a folder, by their paths in it; none if there is no such folder.

        Raises:
            LoradeckError: the place refuses, or does not answer.
        """
        path = f"{self.root}/{folder}"
        entries = self.call(lambda: self._files().find(path, detail=True))
        return {name.partition(f"{path}/")[2]: int(facts["size"] or 0) for name, facts in dict(entries).items()}

    def read(self, paths: Iterable[str]) -> dict[str, bytes | FileNotFoundError | LoradeckError]:
        """Return the contents of small files, read at the same time, or why they cannot be read.

        The reason is a FileNotFoundError if there is no such file.
        """
        names = {f"{self.root}/{path}": path for path in paths}
        contents: dict[str, object] = {}
        with suppress(Exception):  # of any library: each file is asked for again, and says why
            contents = self._files().cat([*names], on_error="return")
        return {path: self._content(name, contents.get(name)) for name, path in names.items()}

    def download(self, path: str, target: Path, size: int, watch: Callable[[bytes], object]) -> None:
        """Write `size` bytes of a file to `target`, in parts, each of which `watch` gets too.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: `target` cannot be written.
            LoradeckError: the place refuses, or does not answer.
        """
        with target.open("wb") as file:
            for begin in range(0, size, PART):
                part = self.call(lambda begin=begin: self._part(path, begin, min(begin + PART, size)), missing=True)
                file.write(part)
                watch(part)

    # ---- writing

    def upload(self, files: Mapping[str, Path]) -> None:
        """Write files, by their paths.

        Raises:
            LoradeckError: the place refuses, or does not answer.
        """
        for path, source in files.items():
            self.call(lambda path=path, source=source: self._files().put_file(str(source), f"{self.root}/{path}"))

    def create(self, path: str, content: bytes) -> bool:
        """Write a file unless there is one already; return whether there was none.

        Raises:
            LoradeckError: the place refuses, or does not answer.
        """
        try:
            self.call(lambda: self._files().pipe_file(f"{self.root}/{path}", content, mode="create"), exists=True)
        except FileExistsError:
            return False
        return True

    def replace(self, path: str, content: bytes) -> None:
        """Write a file, whether there is one or not.

        Raises:
            LoradeckError: the place refuses, or does not answer.
        """
        self.call(lambda: self._files().pipe_file(f"{self.root}/{path}", content))

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files; those that are not there are none.

        Raises:
            LoradeckError: the place refuses, or does not answer.
        """
        for path in paths:
            try:
                self.call(lambda path=path: self._files().rm_file(f"{self.root}/{path}"), missing=True)
            except FileNotFoundError:
                continue

    # ---- calls

    def call(self, function: Callable[[], T], *, missing: bool = False, exists: bool = False) -> T:
        """Call a function, again after a pause if the place fails; `missing`, `exists`: raise these errors as they are.

        Raises:
            FileNotFoundError, FileExistsError: as asked for.
            LoradeckError: the place refuses, or does not answer.
        """
        attempt = 0
        while True:
            try:
                return function()
            except Exception as error:  # of any of the libraries below fsspec
                attempt += 1
                if exists and isinstance(error, FileExistsError):
                    raise
                if missing and self.is_missing(error):
                    raise FileNotFoundError(str(error)) from error
                problem = self.error(error)
                if attempt == ATTEMPTS or not isinstance(problem, StoreUnreachableError):
                    raise problem from error
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))

    def error(self, error: Exception) -> LoradeckError:
        """Return the error of a call that failed: a StoreUnreachableError if the same call may succeed later."""
        return place_error(self.url, error)

    def is_missing(self, error: Exception) -> bool:
        """Return whether an error says that there is no such file, rather than no such bucket."""
        return isinstance(error, FileNotFoundError) and "bucket" not in str(error).lower()

    def _part(self, path: str, begin: int, end: int) -> bytes:
        part = self._files().cat_file(f"{self.root}/{path}", start=begin, end=end)
        if len(part) < end - begin:
            raise CutOffError(f"{path} ends after {begin + len(part)} bytes")
        return part

    def _content(self, name: str, content: object) -> bytes | FileNotFoundError | LoradeckError:
        if isinstance(content, bytes):
            return content
        try:
            return self.call(lambda: self._files().cat_file(name), missing=True)
        except (FileNotFoundError, LoradeckError) as error:
            return error

    def _files(self) -> Any:
        """Return fsspec's file system of this process."""
        process, files = self._opened
        if process != os.getpid():
            files = self._open()
            self._opened = os.getpid(), files
        return files

    def _open(self) -> Any:
        import fsspec

        name, package = self.url.partition("://")[0], self.protocol.package
        try:
            files = fsspec.filesystem(name, skip_instance_cache=True, use_listings_cache=False, **self.protocol.options)
        except ImportError as error:
            raise ConfigError(f"{self.url} needs the package {package}", hint=f"pip install {package}") from error
        if hasattr(files, "retries"):
            files.retries = 1  # `call` has the retries
        return files
