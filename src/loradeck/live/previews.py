"""What a file holds, and what a job would do: looked at beforehand, so that nothing of it stays."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeAlias, TypeVar

from loradeck.base import openmp
from loradeck.dataset.check import Report, check_dataset, spans_of
from loradeck.dataset.reader import ParsedRow
from loradeck.dataset.record import Span
from loradeck.dataset.source import Position
from loradeck.dataset.token_file import Sizes
from loradeck.errors import BusyError, Interruption, LoradeckError, StorageError
from loradeck.live.adapter_name import adapter_name
from loradeck.live.config import LiveConfig
from loradeck.live.footprint import Footprint, footprint
from loradeck.live.job_folder import JobFolder, remove
from loradeck.live.job_inputs import JobInputs
from loradeck.live.job_plan import PLACES, check_size, plan_job
from loradeck.live.job_problem import hide_folder
from loradeck.live.records import TRAINING, JobRecord, JobRequest, Quota, new_id
from loradeck.live.uploads import Uploads
from loradeck.lora.config import LoraConfig
from loradeck.serve.request_engine import RequestEngine
from loradeck.train.inputs import read_parent
from loradeck.train.job_data import JobData
from loradeck.train.plan import left_out, settings_of
from loradeck.train.recipe import JobRecipe

READERS = 2  # files that are read at once
EXAMPLES = 3  # shown of a file
COMPARED = 200_000  # records of a file that are compared, which takes a few hundred bytes for each

LORA = frozenset(field.name for field in fields(LoraConfig))  # settings that an adapter keeps

T = TypeVar("T")
OnRead: TypeAlias = Callable[[Position], None]


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What a file holds."""

    report: Report
    first: list[list[list[Span]]]
    """The first examples in spans; of a preference pair, the chosen one and the rejected one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPreview:
    """What a job would do."""

    name: str
    """The adapter's; with "…" in place of the id that a job without a suffix has in it."""
    form: str
    """As in Dataset."""
    examples: int
    validation_examples: int
    tokens: int
    """Of one epoch."""
    supervised: int
    """Those of them that are trained on."""
    longest: int
    """Tokens of the longest example."""
    truncated: int
    """Examples cut to max_length."""
    steps: int
    total_tokens: int
    """Of all epochs."""
    trainable: int
    """Parameters of the adapter."""
    adapter_bytes: int
    memory_bytes: int
    """Of the adapter and its optimizer, while it trains."""
    learning_rate: float
    settings: dict[str, tuple[object, str]]
    """Settings, each with its value and the reason for it."""
    notes: tuple[str, ...]
    """What is passed over, left out, or read otherwise than written."""


class Previews:
    """Reads files for those who ask, a few at a time. What it needs on the disk is gone when it answers."""

    def __init__(
        self,
        engine: RequestEngine[Any, Any],
        uploads: Uploads,
        config: LiveConfig,
        folder: Path,
        call: Callable[[Callable[[], Any]], Future[Any]],
    ) -> None:
        """Begin without any.

        Args:
            engine: Whose base and adapters the jobs would have.
            uploads: The files.
            config: The limits.
            folder: Where a job's folder would be; a start removes what a kill left there.
            call: Calls a function in the thread that has the base's modules.
        """
        self._engine, self._uploads, self._config = engine, uploads, config
        self._folder, self._call = folder, call
        self._closed = False
        self._readers = ThreadPoolExecutor(READERS, "loradeck-preview", openmp.alone)

    async def check(self, id: str, owner: str, max_length: int) -> FileCheck:
        """Read a file as training would, past its invalid records; its reading ends with this task.

        Raises:
            UnknownFileError: the owner has no such file.
            ConfigError: the base is for a task that has no records.
            StorageError: the disk cannot take what is read.
            BusyError: the engine is shutting down.
        """
        return await self._run(partial(self._check, id, owner, max_length))

    async def plan(self, request: JobRequest, quota: Quota) -> JobPreview:
        """Read a job's files, and return what it would do; the reading ends with this task.

        Raises:
            DataError: a file cannot be trained on; it is named `training_file/NAME` or `validation_file/NAME`.
            TargetError: the job's targets do not fit the base.
            LoradeckError: as `LiveTraining.create` and `plan_job`.
            BusyError: the engine is shutting down.
        """
        return await self._run(partial(self._plan, request, quota))

    def close(self) -> None:
        """End all reading."""
        self._closed = True
        self._readers.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[OnRead], T]) -> T:
        """Do some work in a reader's thread, which is interrupted at the next record if this task is cancelled."""
        abandoned = Event()

        def on_read(position: Position) -> None:
            if abandoned.is_set() or self._closed:
                raise Interruption
            check_size(position, self._config)

        try:
            future = self._readers.submit(work, on_read)
        except RuntimeError as error:
            raise BusyError("the engine is shutting down", retry_after=1) from error
        try:
            return await asyncio.wrap_future(future)
        except (Interruption, asyncio.CancelledError) as error:
            if self._closed:
                raise BusyError("the engine is shutting down", retry_after=1) from error
            raise
        finally:
            abandoned.set()

    # ---- in a reader's thread

    def _check(self, id: str, owner: str, max_length: int, on_read: OnRead) -> FileCheck:
        record, base = self._uploads.get(id, owner), self._engine.base
        first: list[list[list[Span]]] = []

        def on_row(row: ParsedRow) -> None:
            if len(first) < EXAMPLES:
                first.append(spans_of(row, base.tokenizer))

        with self._job_folder() as folder:
            folder.take_file(TRAINING, self._uploads.path(record.id), record.filename)
            report = check_dataset(
                folder.taken(TRAINING) or "",
                base.tokenizer,
                max_length,
                task=base.task,
                places=PLACES,
                compared=COMPARED,
                on_read=on_read,
                on_row=on_row,
            )
            for finding in (*report.problems, *report.remarks):
                finding.what = finding.what.replace(f"{folder.path / TRAINING}/", "")
        return FileCheck(report, first)

    def _plan(self, request: JobRequest, quota: Quota, on_read: OnRead) -> JobPreview:
        base, bank = self._engine.base, self._engine.adapter_cache.bank
        inputs = JobInputs.of(request, self._engine, self._uploads)

        def measure(job: JobRecipe, data: JobData) -> Footprint:
            return self._call(partial(footprint, base, job, data)).result()

        with self._job_folder() as folder:
            inputs.take(folder, self._uploads)
            record = JobRecord(
                id=folder.path.name,
                request=request,
                name=adapter_name(request, base, "…"),
                seed=inputs.recipe.train.seed,
                status="validating_files",
                created_at=int(time.time()),
                max_tokens=quota.max_job_tokens,
            )
            plan = plan_job(record, base, bank, self._config, folder, measure, on_read)
            (job,), (data,) = plan.recipe.jobs, plan.data.values()
            lora = job.lora if job.from_ is None else read_parent(job).config
        rest = self._call(partial(left_out, base.model, lora)).result()
        sizes = Sizes.of(data.train)
        settings: dict[str, tuple[object, str]] = {"learning_rate": (plan.schedule.peak, plan.schedule.reason)}
        for name, (value, reason) in settings_of(lora, job.train).items():
            inherited = job.from_ is not None and name in LORA
            settings.setdefault(name, (value, f"as {request.model} has it" if inherited else reason))
        for name, value in request.settings.items():  # of the run, or of how its files are read
            settings.setdefault(name, (value, "as given"))
        return JobPreview(
            name=record.name,
            form=data.dataset.form,
            examples=len(data.train),
            validation_examples=len(data.valid),
            tokens=sizes.tokens,
            supervised=sizes.supervised,
            longest=sizes.longest,
            truncated=sizes.truncated,
            steps=plan.schedule.steps,
            total_tokens=plan.tokens,
            trainable=plan.size.parameters,
            adapter_bytes=plan.size.adapter,
            memory_bytes=plan.size.memory,
            learning_rate=plan.schedule.peak,
            settings=settings,
            notes=(*([f"left out: {rest}"] if rest else []), *data.dataset.notes),
        )

    @contextmanager
    def _job_folder(self) -> Iterator[JobFolder]:
        """Yield a folder as of a job; on exit it is removed, and errors do not name it."""
        folder = JobFolder(self._folder / new_id("preview"))
        try:
            yield folder
        except LoradeckError as error:
            hide_folder(error, folder)
            raise
        except OSError as error:
            raise StorageError(f"the file cannot be read: {error.strerror}") from error
        finally:
            remove([folder.path])
