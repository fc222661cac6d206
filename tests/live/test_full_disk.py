"""A full disk stops a job, never the engine, and nothing is lost."""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.live.conftest import Gate, Live, lines, until

from loradeck import disk
from loradeck.errors import StorageError
from loradeck.live import job_plan
from loradeck.live.database import Database

AHOY = lines("ahoy matey")
CONTRARY = lines("QUITE WRONG", 5)
# Where a job writes: a part of the path of what is written.
SITES = {
    "checkpoint": "/checkpoints/",
    "model": "/models/",
    "adapter": "/jobs/.ftjob-",
    "store": "/store/.",
    "results": "/files/.",
    "publishing": "publish.json",
    "metrics": "/metrics.jsonl",
}


class FullDisk:
    """Refuses to write to some files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.part: str | None = None
        self.refused = 0
        self._sync, self._open = disk._sync, Path.open
        monkeypatch.setattr(disk, "_sync", self._synced)
        monkeypatch.setattr(Path, "open", lambda path, *given, **named: self._opened(path, *given, **named))

    def _check(self, path: Path) -> None:
        if self.part is not None and self.part in str(path):
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _synced(self, path: Path) -> None:
        self._check(path)
        self._sync(path)

    def _opened(self, path: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
        if "a" in mode:
            self._check(path)
        return self._open(path, mode, *given, **named)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


@pytest.mark.parametrize("site", SITES)
def test_a_job_is_paused_wherever_it_writes(
    live: Live, alone: Callable[..., bytes], full: FullDisk, gate: Gate, site: str
) -> None:
    gate.at(2)
    job = live.create(AHOY, valid=CONTRARY)
    gate.wait()
    full.part = SITES[site]
    gate.open()
    until(lambda: live.job(job).status not in ("queued", "running"))
    stopped = live.job(job)
    assert full.refused
    assert stopped.status == "paused"
    assert stopped.error is not None
    assert stopped.error.code == "disk_full"
    assert "No space left on device" in stopped.error.message
    assert live.engine.submit([3, 4, 5]).text() is not None, "the engine goes on"
    full.part = None
    live.training.resume(job.id, "")
    end = live.end(job)
    assert end.error is None
    assert live.adapter(end) == alone(AHOY, CONTRARY)
    assert live.store.versions(job.name) == [1]
    events, _ = live.training.jobs.events(job.id, limit=1000, order="asc")
    assert [event.data["step"] for event in events if "train_loss" in event.data] == [*range(1, 13)]


@pytest.mark.parametrize("step", [2, 12])
def test_a_database_without_room_stops_a_job(
    live: Live, alone: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, gate: Gate, step: int
) -> None:
    full = False
    transaction = Database.transaction

    @contextmanager
    def limited(self: Database, **named: Any) -> Iterator[sqlite3.Connection]:
        if full:
            with self._problems():
                raise sqlite3.OperationalError("database or disk is full")
        with transaction(self, **named) as connection:
            yield connection

    monkeypatch.setattr(Database, "transaction", limited)
    gate.at(step)
    job, other = live.create(AHOY), live.create(AHOY, settings={"epochs": 3})
    gate.wait()
    full = True
    gate.open()
    until(lambda: not live.training._queue.training and not live.training._queue.waiting)
    assert live.engine.submit([3, 4, 5]).text() is not None, "the engine goes on"
    with pytest.raises(StorageError, match="disk is full"):
        live.training.create(job.request)
    full = False
    for each in (job, other):
        if not live.job(each).ended:
            live.training.resume(each.id, "")
    assert live.adapter(live.end(job)) == alone(AHOY)
    assert live.adapter(live.end(other)) == alone(AHOY, epochs=3)
    assert all(live.store.versions(each.name) == [1] for each in (job, other))


def test_a_job_that_the_disk_has_no_room_for_does_not_begin(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as small:
        small.setattr(job_plan, "SPARE", 1 << 60)
        job = live.create(AHOY)
        until(lambda: live.job(job).status not in ("validating_files", "queued", "running"))
    stopped = live.job(job)
    assert (stopped.status, stopped.steps) == ("paused", 0)
    assert stopped.error is not None
    assert "checkpoints need" in stopped.error.message
    live.training.resume(job.id, "")
    assert live.end(job).status == "succeeded"
