"""What a live server keeps of files, jobs, events and checkpoints. Times are seconds since 1970."""

import re
import secrets
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

JobStatus: TypeAlias = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
CHECKPOINT = re.compile("(ftjob-[0-9a-f]{24}):ckpt-([1-9][0-9]{0,17})")  # what requests call one: its job, its step
TRAINING, VALIDATION = "training_file", "validation_file"  # the files of a job, as requests call them
FINE_TUNE = "fine-tune"  # the purpose of all uploads
ENDS: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
Level: TypeAlias = Literal["info", "warn", "error"]
Record = TypeVar("Record", bound=msgspec.Struct)
Page: TypeAlias = tuple[list[Record], bool]  # and whether there are more


def new_id(kind: str) -> str:
    """Return a new id that nobody can guess, such as `file-` and 24 hexadecimal digits."""
    return f"{kind}-{secrets.token_hex(12)}"


def file_of(text: str) -> tuple[str, str]:
    """Return which file of a job the text of an error is about, and the text with the file's own name."""
    kind = VALIDATION if f"{VALIDATION}/" in text else TRAINING
    return kind, text.replace(f"{kind}/", "")


def job_of(spec: str) -> str | None:
    """Return the id of the job whose checkpoint a name is; None if it is another name."""
    match = CHECKPOINT.fullmatch(spec)
    return match and match[1]


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded file, or a job's result."""

    id: str
    owner: str
    """The name of the API key that it belongs to; "" without keys."""
    filename: str
    """A plain name without folders."""
    purpose: str
    """OpenAI's word: `fine-tune`, or `fine-tune-results`."""
    bytes: int
    created_at: int
    sha256: str


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner may have at most; None is without limit."""

    max_upload_bytes: int | None = None
    """Size of all its files together."""
    max_jobs: int | None = None
    """Jobs that wait or run."""
    max_job_tokens: int | None = None
    """Tokens that one job is trained on, in all its epochs."""


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed; `param` is the field of the request that caused it."""

    code: str
    message: str
    param: str | None = None


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks of a job."""

    owner: str = ""
    model: str
    """The base, or an adapter (`poet`, `poet@2`) whose training goes on."""
    training_file: str
    """Id of a file."""
    validation_file: str | None = None
    method: Literal["supervised", "dpo"] = "supervised"
    suffix: str | None = None
    """The adapter's name."""
    seed: int | None = None
    metadata: dict[str, str] = {}
    learning_rate_multiplier: float | None = None
    """Of the learning rate that the job has by default."""
    settings: dict[str, Any] = {}
    """Keys of an [[adapter]] of a run file, such as r, epochs, batch_size, learning_rate."""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job, and how far it is."""

    id: str
    request: JobRequest
    name: str
    """The name under which its adapter is published."""
    seed: int
    status: JobStatus
    created_at: int
    max_tokens: int | None = None
    """Tokens that it may be trained on."""
    started_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    error: JobError | None = None
    trained_tokens: int | None = None
    steps: int = 0
    """Steps that it has taken."""
    total_steps: int | None = None
    """Steps that it will take, unless it stops early; None before its files are read."""
    adapter: str | None = None
    """The published version, such as `poet@3`."""
    result_files: tuple[str, ...] = ()
    """Ids of the files with its metrics."""

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ENDS


class EventRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a job."""

    number: int = 0
    """Higher than those of all events before it; the store gives it."""
    job: str
    created_at: int
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] = {}
    """Metrics have `step`; so have `samples`, answers to validation prompts."""

    @property
    def id(self) -> str:
        """OpenAI's id of the event."""
        return f"ftevent-{self.number:024x}"


class CheckpointRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint of a job that can be asked like a model."""

    number: int = 0
    """Higher than those of all checkpoints before it; the store gives it."""
    job: str
    step: int
    created_at: int
    metrics: dict[str, Any] = {}

    @property
    def id(self) -> str:
        """OpenAI's id of the checkpoint."""
        return f"ftckpt-{self.number:024x}"

    @property
    def model(self) -> str:
        """The name by which requests select it."""
        return f"{self.job}:ckpt-{self.step}"
