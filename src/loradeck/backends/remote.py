"""Versions at a place elsewhere, such as a bucket, with a cache on this machine.

    NAME/TOKEN/adapter_config.json …    the files of one version; each publishing takes a new folder
    .versions/NAME/NUMBER.json          written last, if there is none: it makes the version visible

The file of a removed version stays, empty, so that its number is never used again.
"""

import hashlib
import logging
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from threading import BoundedSemaphore, Lock

import msgspec

from loradeck.backends.answers import Answers
from loradeck.backends.cache import Cache, Held
from loradeck.backends.cached_names import URLS, cached_adapters
from loradeck.backends.folder import NUMBER, why_not_served
from loradeck.backends.original import Original
from loradeck.backends.place import Place
from loradeck.backends.version_file import StoredFile, VersionFile
from loradeck.disk import Stamp, cache_folder
from loradeck.errors import AdapterError, BusyError, LoradeckError, StoreUnreachableError
from loradeck.lora.manifest import stamp
from loradeck.stored import Stored, read_stored

RECORDS = ".versions"
CACHED_RECORDS = 1 << 17  # a few kilobytes each
RETRY_AFTER = 2  # seconds
RECENT: deque[Held] = deque(maxlen=64)  # kept in the cache by this process, also if only their paths are

log = logging.getLogger(__name__)


class RemoteBackend:
    """A store at a URL."""

    def __init__(self, place: Place, cache_bytes: int, waiting: int | None) -> None:
        """`waiting`: how many calls may wait for the place at the same time; None for any number."""
        self.place = place
        self.location = place.url
        key = hashlib.sha256(place.url.encode()).hexdigest()[:16]
        self.folder = cache_folder().absolute() / "stores" / key
        self._cache = Cache.of(cached_adapters(), cache_bytes)
        self._turns = None if waiting is None else BoundedSemaphore(waiting)
        self._catalogue: Answers[None, dict[str, list[int]]] = Answers(self._list_all, self._waiting)
        self._versions: Answers[str, list[int]] = Answers(self._list, self._waiting)
        self._records: dict[tuple[str, int], VersionFile] = {}
        self._whole: dict[str, Stamp] = {}  # of folders of the cache whose hashes were right
        self._lock = Lock()

    # ---- queries

    def catalogue(self) -> dict[str, list[int]]:
        """Return the version numbers of every adapter by name, including invalid names."""
        return self._catalogue.get(None)

    def versions(self, name: str) -> list[int]:
        """Return the numbers of an adapter's versions, sorted; [] if there is none."""
        return [] if why_not_served(name) else self._versions.get(name)

    def has(self, name: str, number: int) -> bool:
        """Return whether a version is there, usable or not."""
        return number in self.versions(name)

    def read(self, name: str, number: int) -> Stored:
        """Return a version, whose files are downloaded into the cache if they are not there.

        Raises:
            AdapterError: it is unusable or was removed, a file is not what was published, or the cache is full.
            StoreUnreachableError: the place does not answer.
            BusyError: too many calls wait for it.
        """
        version = self._record(name, number)
        held = self._cache.get(version.key, version.nbytes)
        if held is not None and not self._is_whole(version, held.path):
            log.warning("%(folder)s is damaged, and downloaded again", {"folder": str(held.path)})
            self._cache.discard(held)
            held = None
        if held is None:
            with self._waiting():
                held = self._cache.add(version.key, version.nbytes, lambda new: self._download(name, version, new))
        return self._stored(name, number, version, held)

    def listed(self, specs: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Stored | LoradeckError]:
        """Return versions for a listing, or why they are unusable, without their files."""
        keys = [*specs]
        records = self._read_records(keys)
        return {key: self._listed(*key, records[key]) for key in keys}

    def _listed(self, name: str, number: int, version: VersionFile | LoradeckError) -> Stored | LoradeckError:
        if isinstance(version, LoradeckError):
            return version
        files = tuple((file.name, file.size, int(version.published * 1e9), 0, 0) for file in version.files)
        path = self.path(name, number)
        return Stored(name, number, path, version.facts, files, version.sha256, is_here=False)

    def path(self, name: str, number: int) -> Path:
        """Return a path of this name; the files of a version are in the cache, where `read` says."""
        return self.folder / f"{name}@{number}"

    # ---- changes

    def publish(self, name: str, source: Path) -> Stored:
        """Upload a PEFT folder, which is read completely first, and let it appear by writing one last file.

        Raises:
            AdapterError, UnsupportedError: it cannot be loaded, or the place refuses.
            StoreUnreachableError: the place does not answer.
        """
        original = Original.read(source)
        if not self.place.is_conditional:
            log.warning(
                "%(place)s cannot create a file only if there is none: publish from one process at a time",
                {"place": self.location},
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=self.folder) as work:
            folder = Path(work) / name
            folder.mkdir()
            original.copy_to(folder)
            version = _version_of(name, folder)
            files = _paths(name, version)
            try:
                self.place.upload({path: folder / file.name for path, file in files.items()})
                self._check_upload(name, version)
            except BaseException:
                with suppress(LoradeckError):
                    self.place.remove(files)
                raise
            # If this fails, the record may be there all the same, and the files with it.
            number = self._show(name, version)
            self._forget(name)
            held = self._cache.add(version.key, version.nbytes, lambda new: _copy(version, folder, new))
        return self._stored(name, number, version, held)

    def remove(self, name: str, numbers: Sequence[int]) -> None:
        """Remove versions: first each one's record becomes empty, then its files go.

        Raises:
            StoreUnreachableError: the place does not answer.
            AdapterError: it refuses.
        """
        for number in numbers:
            record = self._read_records([(name, number)])[name, number]
            self.place.replace(_record_path(name, number), b"")
            with self._lock:
                self._records.pop((name, number), None)
            self._forget(name)
            if isinstance(record, VersionFile):  # else nobody knows where its files are
                self.place.remove(_paths(name, record))

    # ---- records

    def _list_all(self, _question: None) -> dict[str, list[int]]:
        catalogue: dict[str, list[int]] = {}
        for path, size in self.place.list(RECORDS).items():
            name, _, file = path.rpartition("/")
            if (number := _number(file)) and size:
                catalogue.setdefault(name, []).append(number)
        return catalogue

    def _list(self, name: str) -> list[int]:
        sizes = self.place.list(f"{RECORDS}/{name}")
        return sorted(number for file, size in sizes.items() if (number := _number(file)) and size)

    def _forget(self, name: str) -> None:
        """Ask the place again what there is of a name."""
        self._versions.forget(name)
        self._catalogue.forget(None)

    def _record(self, name: str, number: int) -> VersionFile:
        record = self._read_records([(name, number)])[name, number]
        if isinstance(record, LoradeckError):
            raise record
        return record

    def _read_records(self, keys: Sequence[tuple[str, int]]) -> dict[tuple[str, int], VersionFile | LoradeckError]:
        """Return the records of versions, or why they are unusable. Each is read once: they never change.

        Raises:
            StoreUnreachableError: the place does not answer.
        """
        records: dict[tuple[str, int], VersionFile | LoradeckError] = {}
        with self._lock:
            records.update((key, self._records[key]) for key in keys if key in self._records)
        new = {_record_path(*key): key for key in keys if key not in records}
        if new:
            with self._waiting():
                contents = self.place.read(new)
            records.update((key, self._decoded(*key, contents[path])) for path, key in new.items())
        with self._lock:
            self._records.update((key, record) for key in keys if isinstance(record := records[key], VersionFile))
            while len(self._records) > CACHED_RECORDS:
                self._records.pop(next(iter(self._records)))
        return records

    def _decoded(
        self, name: str, number: int, content: bytes | FileNotFoundError | LoradeckError
    ) -> VersionFile | LoradeckError:
        if isinstance(content, StoreUnreachableError):  # this says nothing about the version
            raise content
        if isinstance(content, LoradeckError):
            return content
        if isinstance(content, FileNotFoundError) or not content:
            self._forget(name)
            return AdapterError(f"{self.location}/{name}@{number} was removed")
        try:
            return VersionFile.decode(content, f"{self.location}/{name}@{number}")
        except AdapterError as error:
            return error

    def _show(self, name: str, version: VersionFile) -> int:
        """Write the record of a version under the next number, and return it."""
        files = self.place.list(f"{RECORDS}/{name}")
        number = max(map(_number, files), default=0) + 1
        content = msgspec.json.encode(version)
        while not self.place.create(_record_path(name, number), content):
            # It is there: another publisher's; or this one's, if the answer to its first attempt was lost.
            if self.place.read([_record_path(name, number)])[_record_path(name, number)] == content:
                break
            number += 1
        return number

    # ---- files

    def _download(self, name: str, version: VersionFile, folder: Path) -> None:
        """Write the files of a version, each of which has the recorded size and sha256 then."""
        for path, file in _paths(name, version).items():
            try:
                digests = [self._sha256(path, file, folder)]
                if digests[-1] != file.sha256:  # damaged on its way, or there
                    digests.append(self._sha256(path, file, folder))
            except FileNotFoundError as error:
                self._forget(name)
                raise AdapterError(f"{self.location}/{path} was removed", hint="Find the adapter again.") from error
            if digests[-1] != file.sha256:
                raise AdapterError(
                    f"{self.location}/{path} is not what was published: its sha256 is {digests[-1]}, not {file.sha256}",
                    hint="It was changed or damaged there. Publish the adapter again, and remove this version.",
                )

    def _sha256(self, path: str, file: StoredFile, folder: Path) -> str:
        """Download a file and return its sha256."""
        digest = hashlib.sha256()
        self.place.download(path, folder / file.name, file.size, digest.update)
        return digest.hexdigest()

    def _check_upload(self, name: str, version: VersionFile) -> None:
        sizes = self.place.list(f"{name}/{version.folder}")
        if sizes != {file.name: file.size for file in version.files}:
            raise StoreUnreachableError(f"{self.location} has not taken all files of {name}", hint="Publish it again.")

    def _is_whole(self, version: VersionFile, folder: Path) -> bool:
        """Return whether a folder of the cache is what was published; it is read once, while it stays the same."""
        before = stamp(folder)
        if self._whole.get(version.key) == before:
            return True
        try:
            is_whole = {*_hashed(folder)} == {*version.files}
        except OSError:
            return False
        if is_whole:
            self._whole[version.key] = before
        return is_whole

    def _stored(self, name: str, number: int, version: VersionFile, held: Held) -> Stored:
        URLS[held.path.name] = f"{self.location}/{name}@{number}"
        RECENT.append(held)
        stored = read_stored(name, number, held.path, None)
        return replace(stored, recorded_sha256=version.sha256, hold=held.hold)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Be one of the calls that wait for the place.

        Raises:
            BusyError: there are too many.
        """
        if self._turns is None:
            yield
            return
        if not self._turns.acquire(blocking=False):
            raise BusyError(f"too many requests wait for {self.location}", retry_after=RETRY_AFTER)
        try:
            yield
        finally:
            self._turns.release()


def _record_path(name: str, number: int) -> str:
    return f"{RECORDS}/{name}/{number}.json"


def _paths(name: str, version: VersionFile) -> dict[str, StoredFile]:
    """Return where the files of a version are."""
    return {f"{name}/{version.folder}/{file.name}": file for file in version.files}


def _number(file: str) -> int:
    """Return the number of a version from the name of its record; 0 if it is none."""
    text, _, ending = file.partition(".")
    return int(text) if NUMBER.fullmatch(text) and ending == "json" else 0


def _version_of(name: str, folder: Path) -> VersionFile:
    """Return the record of a folder's files, which are all of the adapter."""
    now = time.time()
    token = time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime(now)) + f"-{token_hex(4)}"
    return VersionFile(token, now, tuple(_hashed(folder)), read_stored(name, 0, folder, None).facts)


def _hashed(folder: Path) -> Iterator[StoredFile]:
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield StoredFile(path.name, file.tell(), digest)


def _copy(version: VersionFile, folder: Path, new: Path) -> None:
    for file in version.files:
        shutil.copyfile(folder / file.name, new / file.name)
