"""An engine that trains too: files become jobs, jobs become adapters of its store, while it serves.

FOLDER/live.sqlite     what is listed: files, jobs, events, checkpoints
FOLDER/files/ID/       uploaded files and results
FOLDER/jobs/ID/        each job's folder (see live.job_folder)
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Self

from loradeck.base import openmp
from loradeck.dataset.source import Position
from loradeck.errors import BusyError, ConfigError, Interruption, LoradeckError, StorageError, TrainingError
from loradeck.live.adapter_name import adapter_name
from loradeck.live.checkpoint_models import CheckpointModels
from loradeck.live.config import LiveConfig
from loradeck.live.database import Database
from loradeck.live.followers import Followers
from loradeck.live.footprint import Footprint, footprint
from loradeck.live.job_folder import JobFolder, remove
from loradeck.live.job_inputs import JobInputs
from loradeck.live.job_plan import JobPlan, check_size, plan_job
from loradeck.live.job_problem import is_disk_full, job_error
from loradeck.live.job_queue import JobQueue, Ticket
from loradeck.live.job_store import JobStore
from loradeck.live.live_job import GOOD_ENDS, LiveJob
from loradeck.live.live_trainer import LiveTrainer
from loradeck.live.previews import Previews
from loradeck.live.publishing import keep_metrics, publish
from loradeck.live.records import EventRecord, JobRecord, JobRequest, JobStatus, Quota, new_id
from loradeck.live.uploads import Uploads
from loradeck.serve.request_engine import RequestEngine
from loradeck.train.job_data import JobData
from loradeck.train.recipe import JobRecipe

ACTIVE: tuple[JobStatus, ...] = ("validating_files", "queued", "running")
KEPT_DATA = 8  # waiting jobs whose data stays at hand; that of the others is read again

log = logging.getLogger(__name__)


class LiveTraining:
    """Fine-tuning jobs beside an engine's requests, on its one copy of the base. Any thread may call it.

    What a job is, and how far it got, is on disk: after a crash all jobs go on by themselves, to the same bits.
    """

    def __init__(self, engine: RequestEngine[Any, Any], folder: str | Path, config: LiveConfig | None = None) -> None:
        """Open the folder, remove what a crash left half, and go on with the jobs in it.

        Raises:
            ConfigError: the engine has no store to publish to, or is trained already.
            StorageError: the folder cannot be used, or another server uses it.
        """
        if engine.store is None:
            raise ConfigError("the engine has no store to publish adapters to", hint="Give it a folder of adapters.")
        self.engine, self.base, self.store = engine, engine.base, engine.store
        self.config = config or LiveConfig()
        self.folder = Path(folder).absolute()
        self._followers = Followers()
        self._queue = JobQueue(self.config.train_bytes)
        self._plans: dict[str, JobPlan | None] = {}
        """Of the jobs in the queue; None: to be made again."""
        self._wanted: set[str] = set()
        """The jobs that are to go on: all that have not ended and are not paused."""
        self._publishing: set[str] = set()
        self._closed = False
        self._lock = RLock()
        self._reader = ThreadPoolExecutor(1, "loradeck-read", openmp.alone)
        self._writer = ThreadPoolExecutor(1, "loradeck-publish", openmp.alone)
        with ExitStack() as stack:
            self._database = Database(self.folder / "live.sqlite")
            stack.callback(self._database.close)
            self.uploads = Uploads(self._database, self.folder / "files")
            self.jobs = JobStore(self._database)
            pending = self._sweep()
            self._trainer = LiveTrainer(engine, self.config)
            stack.pop_all()  # from now on `close` does it
        self.previews = Previews(engine, self.uploads, self.config, self.folder / "jobs", self._trainer.call)
        self._models = CheckpointModels(self.folder / "jobs")
        engine.adapter_cache.sources.append(self._models)
        for record in pending:
            self._plan_later(record)

    def _sweep(self) -> list[JobRecord]:
        """Remove what a crash left half, and return the jobs that go on, those that trained first.

        Raises:
            StorageError: the folder cannot be changed.
        """
        folders = self.folder / "jobs"
        pending = self.jobs.pending()
        goes_on = {record.id for record in pending}
        try:
            folders.mkdir(exist_ok=True)
            remove(path for path in folders.iterdir() if not self.jobs.has(path.name))
            for path in folders.iterdir():
                if path.name in goes_on:
                    self._folder(path.name).sweep()
                else:
                    self._folder(path.name).free()
        except OSError as error:
            raise StorageError(f"{folders} cannot be changed: {error.strerror}") from error
        going = (record for record in pending if record.status != "paused")
        return sorted(going, key=lambda record: record.status != "running")

    # ---- for owners

    def create(self, request: JobRequest, quota: Quota | None = None) -> JobRecord:
        """Add a job, whose files are then read and validated.

        Raises:
            ConfigError: invalid settings, or a file for another purpose.
            UnknownFileError: the owner has no such file.
            UnknownAdapterError, AdapterError: the model is neither the base nor an adapter to go on from.
            AdapterNameError: the adapter's name is invalid.
            QuotaError: the owner has as many jobs as allowed.
            StorageError: the disk cannot take it.
            BusyError: the engine is shutting down.
        """
        inputs = JobInputs.of(request, self.engine, self.uploads)
        id = new_id("ftjob")
        name = adapter_name(request, self.base, id)
        folder = self._folder(id)
        try:
            inputs.take(folder, self.uploads)
            with self._lock:
                self._check_open()
                record = self.jobs.add(request, id=id, name=name, seed=inputs.recipe.train.seed, quota=quota)
        except BaseException:
            remove([folder.path])
            raise
        with suppress(StorageError):  # the job is there
            self._say(id, f"Created fine-tuning job: {id}")
            self._say(id, f"Validating training file: {request.training_file}")
        with self._lock:
            self._plan_later(record)
        return record

    def cancel(self, id: str, owner: str) -> JobRecord:
        """End a job without an adapter; its checkpoints stay models that can be asked.

        Raises:
            UnknownJobError: the owner has no such job.
            ConfigError: it has ended.
        """
        with self._lock:
            self._check_status(id, owner, "cancelled", *ACTIVE, "paused")
            self._say(id, "The job was cancelled")
            record = self._settle(id, status="cancelled", finished_at=int(time.time()), estimated_finish=None)
            if id not in self._queue:  # else once it has left the base
                self._folder(id).free()
            self._take_out(id)
        return record

    def pause(self, id: str, owner: str) -> JobRecord:
        """Let a job rest; its memory is freed, and `resume` goes on to the same bits.

        Raises:
            UnknownJobError: the owner has no such job.
            ConfigError: it is paused, or has ended.
        """
        with self._lock:
            self._check_status(id, owner, "paused", *ACTIVE)
            self._say(id, "The job was paused")
            record = self._settle(id, status="paused", estimated_finish=None)
            self._take_out(id)
        return record

    def resume(self, id: str, owner: str) -> JobRecord:
        """Let a paused job go on, or one that a full disk stopped.

        Raises:
            UnknownJobError: the owner has no such job.
            ConfigError: it goes on already, or has ended.
            BusyError: the engine is shutting down.
        """
        with self._lock:
            self._check_open()
            stopped = () if id in self._wanted else ACTIVE
            record = self._check_status(id, owner, "resumed", "paused", *stopped)
            status: JobStatus = "validating_files" if record.total_steps is None else "queued"
            record = self.jobs.update(id, status=status, error=None)
            self._say(id, "The job was resumed")
            self._plan_later(record)
        return record

    async def follow(self, id: str, owner: str, after: str | None = None) -> AsyncIterator[EventRecord]:
        """Yield a job's events from the one after `after`, until the job has ended.

        Raises:
            UnknownJobError: the owner has no such job.
            ConfigError: `after` is not the id of an event.
        """
        with self._followers.changes(id) as changed:
            while True:
                changed.clear()
                record = await asyncio.to_thread(self.jobs.get, id, owner)
                events, more = await asyncio.to_thread(self.jobs.events, id, after=after, limit=100, order="asc")
                for event in events:
                    yield event
                    after = event.id
                if not more and (record.ended or self._closed):
                    return
                if not more:
                    await changed.wait()

    def close(self) -> None:
        """End training within a piece of a pass, with a checkpoint of each job; all go on at the next start."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wanted.clear()
        self.previews.close()
        self._trainer.close()
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._writer.shutdown(wait=True)
        self.engine.adapter_cache.sources.remove(self._models)
        self._followers.wake_all()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # ---- a job's life: planned, queued, trained, published

    def _plan_later(self, record: JobRecord) -> None:
        self._wanted.add(record.id)
        self._reader.submit(self._guarded, record, partial(self._plan, record))

    def _plan(self, record: JobRecord) -> None:
        """Read a job's files, and let it wait for its turn."""
        id = record.id
        if id not in self._wanted or id in self._queue:
            return
        plan = self._read(record)
        with self._lock:
            if id not in self._wanted or id in self._queue:
                return
            if self.jobs.get(id, record.request.owner).status == "validating_files":
                self.jobs.update(id, status="queued", total_steps=plan.schedule.steps)
                self._say(id, "Files validated, moving job to queued state")
            self._queue.add(Ticket(id, record.request.owner, plan.size.memory, plan.tokens))
            self._plans[id] = plan if len(self._plans) < KEPT_DATA else None
        self._admit_later()

    def _read(self, record: JobRecord) -> JobPlan:
        """Read a job's files. Its parent is checked with the bank that requests use, which any thread may."""
        bank, on_read = self.engine.adapter_cache.bank, partial(self._on_read, record.id)
        return plan_job(record, self.base, bank, self.config, self._folder(record.id), self._measure, on_read)

    def _on_read(self, id: str, position: Position) -> None:
        if id not in self._wanted:
            raise Interruption
        check_size(position, self.config)

    def _measure(self, job: JobRecipe, data: JobData) -> Footprint:
        return self._trainer.call(partial(footprint, self.base, job, data)).result()

    def _admit_later(self) -> None:
        with suppress(RuntimeError):  # closed
            self._writer.submit(self._admit)

    def _admit(self) -> None:
        """Start the jobs whose turn it is."""
        with self._lock:
            for id in () if self._closed else self._queue.admit():
                record = self.jobs.record(id)
                self._guarded(record, partial(self._start, record))

    def _start(self, record: JobRecord) -> None:
        id = record.id
        if record.started_at is None:
            self._say(id, "Fine-tuning job started")
        record = self.jobs.update(id, status="running", started_at=record.started_at or int(time.time()))
        if plan := self._plans[id]:
            self._train(record, plan)
        else:
            self._reader.submit(self._guarded, record, lambda: self._train(record, self._read(record)))

    def _train(self, record: JobRecord, plan: JobPlan) -> None:
        id = record.id
        job = LiveJob(plan.recipe, plan.data, self._folder(id), self.jobs, self._followers.wake)
        with self._lock:
            if id not in self._wanted:
                raise Interruption
            then = partial(self._end_later, record, job)
            self._trainer.join(id, job.passes(self.base, self._trainer.bank), then)

    def _end_later(self, record: JobRecord, job: LiveJob, error: BaseException | None) -> None:
        self._writer.submit(self._guarded, record, partial(self._end, record, job, error))

    def _end(self, record: JobRecord, job: LiveJob, error: BaseException | None) -> None:
        """Do what follows the last pass of a job, or its interruption."""
        if error is not None:
            raise error
        end = job.end
        assert end is not None
        if end.reason not in GOOD_ENDS:
            raise TrainingError(*end.detail.split("\n")[:1], hint=end.detail.partition("\n")[2])
        self._publish(record)
        self._leave_queue(record.id)

    def _publish(self, record: JobRecord) -> None:
        id, folder = record.id, self._folder(record.id)
        with self._lock:
            if self.jobs.record(id).status != "running":  # cancelled or paused at its last step
                raise Interruption
            self._publishing.add(id)
        try:
            stored = publish(record, folder, self.store)
            results = (keep_metrics(record, folder, self.uploads),)
            for message in (f"New fine-tuned model created: {stored.spec}", "The job has successfully completed"):
                self._say(id, message, once=True)
            with self._lock:
                self._settle(
                    id,
                    status="succeeded",
                    finished_at=int(time.time()),
                    estimated_finish=None,
                    adapter=stored.spec,
                    result_files=results,
                )
        finally:
            self._publishing.discard(id)
        folder.free()

    def _guarded(self, record: JobRecord, work: Callable[[], None]) -> None:
        """Do some work for a job in a thread; an error concerns this job alone."""
        try:
            work()
        except Interruption:
            self._leave_queue(record.id)
        except BusyError:  # the engine is shutting down; the job goes on at the next start
            log.info("the job %s waits for the next start", record.id)
        except Exception as error:
            if not isinstance(error, LoradeckError) and not is_disk_full(error):
                log.exception("the job %s failed", record.id)
            self._fail(record, error)
            self._leave_queue(record.id)

    def _fail(self, record: JobRecord, error: Exception) -> None:
        """End a job with an error; if the disk is full, pause it, so that nothing is lost."""
        id, problem = record.id, job_error(error, self._folder(record.id))
        full = problem.code == "disk_full"
        try:
            with self._lock:
                if self.jobs.record(id).status not in ACTIVE:
                    return  # it was cancelled or paused meanwhile
                self._wanted.discard(id)
                finished_at = None if full else int(time.time())
                status: JobStatus = "paused" if full else "failed"
                self._say(id, problem.message, level="warn" if full else "error")
                self._settle(id, status=status, error=problem, finished_at=finished_at, estimated_finish=None)
            if not full:
                self._folder(id).free()
        except StorageError:
            log.exception("the job %s rests until it is resumed, or until the next start", id)

    def _leave_queue(self, id: str) -> None:
        """Give a job's place to another; one that was paused and resumed meanwhile waits again."""
        with self._lock:
            self._queue.remove(id)
            self._plans.pop(id, None)
            if self._closed:
                return
            record = self.jobs.record(id)
            if record.status == "cancelled":
                self._folder(id).free()
            if id in self._wanted:
                self._plan_later(record)
        self._admit_later()

    def _take_out(self, id: str) -> None:
        """Let a job neither be read, nor wait, nor train."""
        if self._queue.trains(id):
            self._trainer.leave(id)  # its place is free once it has left
        else:
            self._queue.remove(id)
            self._plans.pop(id, None)
            self._admit_later()

    # ---- records

    def _folder(self, id: str) -> JobFolder:
        return JobFolder(self.folder / "jobs" / id)

    def _settle(self, id: str, **fields: Any) -> JobRecord:
        """Change a job that does not go on."""
        self._wanted.discard(id)
        record = self.jobs.update(id, **fields)
        self._followers.wake(id)
        return record

    def _say(self, id: str, message: str, *, once: bool = False, level: Any = "info") -> None:
        """Add an event; `once`: unless a process that was killed has added it."""
        if not once or all(event.message != message for event in self.jobs.events(id, limit=5)[0]):
            self.jobs.add_event(id, message, level=level)
            self._followers.wake(id)

    def _check_status(self, id: str, owner: str, what: str, *allowed: JobStatus) -> JobRecord:
        record = self.jobs.get(id, owner)
        if record.status not in allowed or id in self._publishing:
            status = "being published" if id in self._publishing else record.status
            raise ConfigError(f"the job is {status} and cannot be {what}")
        return record

    def _check_open(self) -> None:
        if self._closed:
            raise BusyError("the engine is shutting down", retry_after=1)
