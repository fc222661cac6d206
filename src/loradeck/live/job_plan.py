"""What a job will do, once its files are read: validated against everything that is known before it trains."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

from loradeck.base.load import Base
from loradeck.dataset.source import Position
from loradeck.dataset.token_file import Sizes
from loradeck.errors import ConfigError, DataError, QuotaError, StorageError
from loradeck.live.config import LiveConfig
from loradeck.live.footprint import Footprint
from loradeck.live.job_folder import JobFolder
from loradeck.live.job_recipe import run_recipe
from loradeck.live.records import JobRecord
from loradeck.live.uploads import SPARE
from loradeck.lora.bank import Bank
from loradeck.train.job_data import JobData, read_data
from loradeck.train.objective import objective_of
from loradeck.train.recipe import JobRecipe, RunRecipe
from loradeck.train.schedule import Schedule
from loradeck.train.trainer import check_context

PLACES = 20  # wrong lines of a file that are told, of each cause


@dataclass(slots=True)
class JobPlan:
    """A job whose files are valid."""

    recipe: RunRecipe
    data: dict[str, JobData]
    size: Footprint
    schedule: Schedule
    tokens: int
    """That it will be trained on, in all epochs."""


def check_size(position: Position, config: LiveConfig) -> None:
    """Check how much of a file was read.

    Raises:
        DataError: it is larger than allowed, once it is decompressed.
    """
    if position.size > config.max_file_bytes:
        raise DataError(
            f"{position.file} has more than {config.max_file_bytes:,} bytes once it is decompressed",
            hint="Upload fewer records.",
        )


def plan_job(
    record: JobRecord,
    base: Base,
    bank: Bank,
    config: LiveConfig,
    folder: JobFolder,
    measure: Callable[[JobRecipe, JobData], Footprint],
    on_read: Callable[[Position], None],
) -> JobPlan:
    """Read a job's files, with a call of `on_read` after each record, and return what the job will do.

    `measure` is called with the job and its data, and returns what it will take.

    Raises:
        DataError: a file cannot be trained on, or not by the job's method.
        ConfigError, TargetError, AdapterError: the settings do not fit the base or the adapter that the job goes on
            from, or the job needs more memory than all jobs have.
        QuotaError: it would be trained on more tokens than allowed.
        StorageError: the disk has no room for its checkpoints.
    """
    recipe = run_recipe(record, base, config, folder)
    (job,) = recipe.jobs
    data = read_data([job], base, bank, on_read, places=PLACES)
    examples = data[job.name]
    preferences = examples.dataset.preferences
    if base.task == "generate" and preferences != (record.request.method == "dpo"):
        kind, method = ("preference pairs", "dpo") if preferences else ("no preference pairs", "supervised")
        raise DataError(f"{examples.dataset.name} has {kind}", hint=f"Give the method {method}.")
    check_context(base, examples.train, examples.valid)
    needs_reference = objective_of(base.task, job.train, preferences=preferences).needs_reference
    schedule = Schedule.of(job.train, len(examples.train), base.model.config, preferences=needs_reference)
    if multiplier := record.request.learning_rate_multiplier:
        reason = f"{schedule.reason}; times {multiplier:g}, as given"
        schedule = replace(schedule, peak=schedule.peak * multiplier, reason=reason)
        train = replace(job.train, learning_rate=schedule.peak)
        recipe = replace(recipe, jobs=(replace(job, train=train),))
    epochs = schedule.steps / math.ceil(len(examples.train) / job.train.batch_size)
    tokens = math.ceil(Sizes.of(examples.train).tokens * epochs)
    if record.max_tokens is not None and tokens > record.max_tokens:
        raise QuotaError(
            f"the job would be trained on {tokens:,} tokens; this API key may use {record.max_tokens:,} for a job",
            hint="Give fewer examples, or fewer epochs.",
        )
    size = measure(job, examples)
    if size.memory > config.train_bytes:
        raise ConfigError(
            f"the job needs {size.memory:,} bytes for its adapter and optimizer; all jobs together may have "
            f"{config.train_bytes:,}",
            hint="Give a smaller r, or fewer modules.",
        )
    free = shutil.disk_usage(folder.path).free
    if size.disk + SPARE > free:
        raise StorageError(
            f"the job's checkpoints need {size.disk:,} bytes of the disk, which has {free:,}",
            hint="Make room on the server's disk, and resume the job.",
        )
    return JobPlan(recipe, data, size, schedule, tokens)
