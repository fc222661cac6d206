"""Publish a job's adapter and its metrics once, whenever the process is killed."""

from contextlib import suppress

import msgspec

from loradeck.disk import write_file
from loradeck.errors import UnknownAdapterError
from loradeck.live.job_folder import JobFolder, remove
from loradeck.live.metrics_file import metrics_csv
from loradeck.live.records import JobRecord
from loradeck.live.uploads import Uploads
from loradeck.store import AdapterStore
from loradeck.stored import Stored, read_stored
from loradeck.train.history import JobHistory, read_history

INTENT = "publish.json"  # the latest version there was before
RESULTS = "fine-tune-results"


def publish(record: JobRecord, folder: JobFolder, store: AdapterStore) -> Stored:
    """Publish the adapter of a job, unless a version that came later than its end has the same content.

    Raises:
        AdapterError: it cannot be published.
    """
    digest = read_stored(record.name, 0, folder.path, None).sha256()
    intent = folder.path / INTENT
    if intent.exists():  # what another attempt left, which a kill ended
        remove(path for path in store.folder.iterdir() if path.name.startswith(f".{record.name}@"))
    else:
        write_file(intent, msgspec.json.encode(max(_versions(store, record.name), default=0)))
    before = msgspec.json.decode(intent.read_bytes(), type=int)
    for number in reversed(_versions(store, record.name)):
        with suppress(UnknownAdapterError):  # removed just now
            if number > before and (stored := store.find(f"{record.name}@{number}")).sha256() == digest:
                return stored
    return store.publish(record.name, folder.path)


def keep_metrics(record: JobRecord, folder: JobFolder, uploads: Uploads) -> str:
    """Keep a job's metrics as a file of its owner's, unless there is one, and return its id.

    Raises:
        StorageError: the disk cannot take it.
    """
    name = f"{record.id}-metrics.csv"
    owner = record.request.owner
    files, _ = uploads.list(owner, purpose=RESULTS)
    for file in files:
        if file.filename == name:
            return file.id
    with uploads.upload(owner, name, RESULTS) as upload:
        upload.write(metrics_csv(read_history(folder.path).get(record.id, JobHistory())))
    return upload.record.id


def _versions(store: AdapterStore, name: str) -> list[int]:
    try:
        return store.versions(name)
    except UnknownAdapterError:
        return []
