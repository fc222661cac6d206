"""Files, fine-tuning jobs, their events and checkpoints, in OpenAI's shapes."""

from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from loradeck.live.records import CheckpointRecord, EventRecord, FileRecord, JobError, JobRecord, JobStatus, Level


class Entry(Protocol):
    """What lists have."""

    id: str


T = TypeVar("T", bound=Entry)


class Page(msgspec.Struct, Generic[T]):
    """A part of a list."""

    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"

    @classmethod
    def of(cls, data: list[T], has_more: bool) -> "Page[T]":
        """Return a page of these entries."""
        return cls(data, has_more, *((data[0].id, data[-1].id) if data else (None, None)))


class FileObject(msgspec.Struct, kw_only=True):
    """An uploaded file, or a job's metrics."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, record: FileRecord) -> "FileObject":
        """Return a file as clients read it."""
        return cls(
            id=record.id,
            bytes=record.bytes,
            created_at=record.created_at,
            filename=record.filename,
            purpose=record.purpose,
        )


class FileDeleted(msgspec.Struct):
    """A file that is gone."""

    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


class JobHyperparameters(msgspec.Struct, kw_only=True):
    """Those that a job was asked to have; `auto` is the default."""

    n_epochs: int | str
    batch_size: int | str
    learning_rate_multiplier: float | str
    beta: float | str | UnsetType = UNSET


class JobMethodSettings(msgspec.Struct):
    """The settings of a job's method."""

    hyperparameters: JobHyperparameters


class JobMethod(msgspec.Struct, omit_defaults=True):
    """How a job trains."""

    type: Literal["supervised", "dpo"]
    supervised: JobMethodSettings | None = None
    dpo: JobMethodSettings | None = None


class FineTuningJob(msgspec.Struct, kw_only=True):
    """A job. `lora`, `name`, `steps` and `total_steps` are additions to OpenAI's shape."""

    id: str
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    """The published version of the adapter, such as `poet@3`."""
    finished_at: int | None
    hyperparameters: JobHyperparameters
    model: str
    organization_id: str
    """The name of the API key that the job belongs to."""
    result_files: tuple[str, ...]
    seed: int
    status: JobStatus
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str]
    method: JobMethod
    user_provided_suffix: str | None
    name: str
    """The adapter's name."""
    lora: dict[str, Any]
    started_at: int | None
    steps: int
    total_steps: int | None
    object: Literal["fine_tuning.job"] = "fine_tuning.job"

    @classmethod
    def of(cls, record: JobRecord) -> "FineTuningJob":
        """Return a job as clients read it."""
        request = record.request
        settings = dict(request.settings)
        hyperparameters = JobHyperparameters(
            n_epochs=settings.pop("epochs", "auto"),
            batch_size=settings.pop("batch_size", "auto"),
            learning_rate_multiplier=request.learning_rate_multiplier or "auto",
            beta=settings.pop("dpo_beta", "auto") if request.method == "dpo" else UNSET,
        )
        method = JobMethod(request.method)
        setattr(method, request.method, JobMethodSettings(hyperparameters))
        return cls(
            id=record.id,
            created_at=record.created_at,
            error=record.error,
            fine_tuned_model=record.adapter,
            finished_at=record.finished_at,
            hyperparameters=hyperparameters,
            model=request.model,
            organization_id=request.owner,
            result_files=record.result_files,
            seed=record.seed,
            status=record.status,
            trained_tokens=record.trained_tokens,
            training_file=request.training_file,
            validation_file=request.validation_file,
            estimated_finish=record.estimated_finish,
            integrations=[],
            metadata=request.metadata,
            method=method,
            user_provided_suffix=request.suffix,
            name=record.name,
            lora=settings,
            started_at=record.started_at,
            steps=record.steps,
            total_steps=record.total_steps,
        )


class FineTuningJobEvent(msgspec.Struct, kw_only=True):
    """Something that happened to a job."""

    id: str
    created_at: int
    level: Level
    message: str
    data: dict[str, Any]
    type: Literal["message", "metrics"]
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"

    @classmethod
    def of(cls, record: EventRecord) -> "FineTuningJobEvent":
        """Return an event as clients read it."""
        return cls(
            id=record.id,
            created_at=record.created_at,
            level=record.level,
            message=record.message,
            data=record.data,
            type=record.type,
        )


class FineTuningJobCheckpoint(msgspec.Struct, kw_only=True):
    """A checkpoint of a job, which can be asked like a model."""

    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    """The name that requests give as their `model`."""
    fine_tuning_job_id: str
    metrics: dict[str, Any]
    step_number: int
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"

    @classmethod
    def of(cls, record: CheckpointRecord) -> "FineTuningJobCheckpoint":
        """Return a checkpoint as clients read it."""
        return cls(
            id=record.id,
            created_at=record.created_at,
            fine_tuned_model_checkpoint=record.model,
            fine_tuning_job_id=record.job,
            metrics={"step": record.step, **record.metrics},
            step_number=record.step,
        )
