"""The jobs of a live server, with their events and checkpoints, as rows of its database."""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from loradeck.errors import ConfigError, QuotaError, UnknownJobError
from loradeck.live.database import Database
from loradeck.live.records import (
    ENDS,
    CheckpointRecord,
    EventRecord,
    JobRecord,
    JobRequest,
    JobStatus,
    Level,
    Page,
    Quota,
    Record,
    new_id,
)

T = TypeVar("T", EventRecord, CheckpointRecord)
PENDING = f"status NOT IN {tuple(sorted(ENDS))}"


class JobStore:
    """The jobs of all owners, who see their own only. Thread-safe; each change is on the disk when its call returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ---- jobs

    def add(
        self, request: JobRequest, *, name: str, seed: int, quota: Quota | None = None, id: str | None = None
    ) -> JobRecord:
        """Add a job, whose files are to be validated, with a new id unless one is given.

        Raises:
            QuotaError: its owner has as many as allowed that have not ended.
        """
        quota = quota or Quota()
        record = JobRecord(
            id=id or new_id("ftjob"),
            request=request,
            name=name,
            seed=seed,
            status="validating_files",
            created_at=int(time.time()),
            max_tokens=quota.max_job_tokens,
        )
        with self._database.transaction() as connection:
            query = f"SELECT count(*) FROM jobs WHERE owner = ? AND {PENDING}"
            (count,) = connection.execute(query, (request.owner,)).fetchone()
            if quota.max_jobs is not None and count >= quota.max_jobs:
                raise QuotaError(
                    f"this API key may have {quota.max_jobs} jobs at once, and has {count}",
                    hint="Wait for one to end, or cancel it.",
                )
            values = (record.id, request.owner, record.status, _json(record))
            connection.execute("INSERT INTO jobs (id, owner, status, record) VALUES (?, ?, ?, ?)", values)
        return record

    def update(self, id: str, *, sync: bool = True, **fields: Any) -> JobRecord:
        """Change fields of a job, and return it; `sync` as in `Database.transaction`.

        Raises:
            UnknownJobError: there is no such job.
        """
        with self._database.transaction(sync=sync) as connection:
            record = msgspec.structs.replace(self._job("id = ?", id), **fields)
            values = (record.status, _json(record), id)
            connection.execute("UPDATE jobs SET status = ?, record = ? WHERE id = ?", values)
        return record

    def get(self, id: str, owner: str) -> JobRecord:
        """Return a job.

        Raises:
            UnknownJobError: the owner has no such job.
        """
        return self._job("id = ? AND owner = ?", id, owner)

    def record(self, id: str) -> JobRecord:
        """Return a job, whoever its owner is.

        Raises:
            UnknownJobError: there is no such job.
        """
        return self._job("id = ?", id)

    def has(self, id: str) -> bool:
        """Return whether there is a job of this id."""
        return bool(self._database.rows("SELECT 1 FROM jobs WHERE id = ?", (id,)))

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[JobRecord]:
        """Return an owner's jobs, the newest first, from the one after `after`, and whether there are more.

        `metadata` are the pairs that each of them has.

        Raises:
            UnknownJobError: the owner has no job `after`.
        """
        where, values = ["owner = ?"], [owner]
        if after is not None:
            self.get(after, owner)
            where.append("number < (SELECT number FROM jobs WHERE id = ?)")
            values.append(after)
        for pair in (metadata or {}).items():
            where.append("EXISTS (SELECT * FROM json_each(record, '$.request.metadata') WHERE key = ? AND value = ?)")
            values += pair
        query = f"SELECT record FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?"
        rows = self._database.rows(query, (*values, limit + 1))
        return [_decode(row[0], JobRecord) for row in rows[:limit]], len(rows) > limit

    def pending(self) -> Sequence[JobRecord]:
        """Return the jobs of all owners that have not ended, the oldest first."""
        rows = self._database.rows(f"SELECT record FROM jobs WHERE {PENDING} ORDER BY number")
        return [_decode(row[0], JobRecord) for row in rows]

    def counts(self) -> dict[JobStatus, int]:
        """Return how many jobs of all owners are in each status that any of them has."""
        return dict(self._database.rows("SELECT status, count(*) FROM jobs GROUP BY status"))

    # ---- events

    def add_event(
        self, job: str, message: str, data: Mapping[str, Any] | None = None, *, level: Level = "info"
    ) -> EventRecord:
        """Add an event of a job: metrics if its data has more than a step, and no samples.

        It may be lost in a power cut, as the job then goes on from a checkpoint before it.
        """
        data = dict(data or {})
        record = EventRecord(
            job=job,
            created_at=int(time.time()),
            level=level,
            type="metrics" if data.keys() - {"step", "samples"} else "message",
            message=message,
            data=data,
        )
        with self._database.transaction(sync=False) as connection:
            values = (job, data.get("step"), _json(record))
            cursor = connection.execute("INSERT INTO events (job, step, record) VALUES (?, ?, ?)", values)
        return msgspec.structs.replace(record, number=cursor.lastrowid)

    def events(
        self, job: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> Page[EventRecord]:
        """Return a job's events, the newest first, from the one after `after`, and whether there are more.

        Raises:
            ConfigError: `after` is not the id of an event.
        """
        return self._page("events", EventRecord, job, after, limit, order)

    def truncate_events(self, job: str, step: int) -> None:
        """Remove the metrics after a step, from which the job goes on."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM events WHERE job = ? AND step > ?", (job, step))

    # ---- checkpoints

    def add_checkpoint(self, job: str, step: int, metrics: Mapping[str, Any]) -> CheckpointRecord:
        """Add the checkpoint of a step; a second one of the same step takes its place."""
        record = CheckpointRecord(job=job, step=step, created_at=int(time.time()), metrics=dict(metrics))
        with self._database.transaction() as connection:
            query = "INSERT OR REPLACE INTO checkpoints (job, step, record) VALUES (?, ?, ?)"
            cursor = connection.execute(query, (job, step, _json(record)))
        return msgspec.structs.replace(record, number=cursor.lastrowid)

    def checkpoints(self, job: str, *, after: str | None = None, limit: int = 10) -> Page[CheckpointRecord]:
        """Return a job's checkpoints, the newest first, from the one after `after`, and whether there are more.

        Raises:
            ConfigError: `after` is not the id of a checkpoint.
        """
        return self._page("checkpoints", CheckpointRecord, job, after, limit, "desc")

    def remove_checkpoint(self, job: str, step: int) -> None:
        """Remove a checkpoint, if it is there."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM checkpoints WHERE job = ? AND step = ?", (job, step))

    def _job(self, where: str, *values: str) -> JobRecord:
        rows = self._database.rows(f"SELECT record FROM jobs WHERE {where}", values)
        if not rows:
            raise UnknownJobError(f"there is no job {values[0][:128]!r}")
        return _decode(rows[0][0], JobRecord)

    def _page(
        self, table: str, kind: type[T], job: str, after: str | None, limit: int, order: Literal["asc", "desc"]
    ) -> Page[T]:
        where, values = "job = ?", (job, limit + 1)
        if after is not None:
            where += f" AND number {'<' if order == 'desc' else '>'} {_number(after)}"
        query = f"SELECT number, record FROM {table} WHERE {where} ORDER BY number {order} LIMIT ?"
        rows = self._database.rows(query, values)
        records = [msgspec.structs.replace(_decode(text, kind), number=number) for number, text in rows[:limit]]
        return records, len(rows) > limit


def _number(id: str) -> int:
    """Return the number in the id of an event or a checkpoint, whether it is there or not.

    Raises:
        ConfigError: it is no such id.
    """
    match = re.fullmatch("ft(?:event|ckpt)-([0-9a-f]{24})", id)
    number = int(match[1], 16) if match else -1
    if not 0 <= number < 2**63:  # SQLite's integers
        raise ConfigError(f"after={id[:128]!r} is not the id of an event or a checkpoint")
    return number


def _json(record: msgspec.Struct) -> str:
    return msgspec.json.encode(record).decode()


def _decode(text: str, kind: type[Record]) -> Record:
    return msgspec.json.decode(text, type=kind)
