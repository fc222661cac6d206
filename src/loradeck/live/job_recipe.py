"""What a client asked of a job, as the recipe that `loradeck train` would follow."""

from dataclasses import replace
from pathlib import Path

from loradeck.base.load import Base
from loradeck.errors import ConfigError
from loradeck.live.config import LiveConfig
from loradeck.live.job_folder import PARENT, JobFolder
from loradeck.live.records import TRAINING, VALIDATION, JobRecord, JobRequest
from loradeck.train.config import PassConfig
from loradeck.train.recipe import RUN_FILE, JobRecipe, RunRecipe, job_recipe, read_recipe

SETTINGS = "lora"  # where clients write a job's settings
SAMPLES = "samples"  # of them, the one that all jobs of a run file share
MOST_SAMPLES = 8  # as each is answered at each evaluation


def check_settings(request: JobRequest, parent: Path | None) -> JobRecipe:
    """Return the recipe of a request whose files are not there yet.

    Raises:
        ConfigError: unknown settings or invalid values; every one is named.
    """
    if request.learning_rate_multiplier is not None:
        if not 0 < request.learning_rate_multiplier <= 1000:
            raise ConfigError(
                f"learning_rate_multiplier is {request.learning_rate_multiplier}, not a number above 0, up to 1000"
            )
        if request.settings.get("learning_rate") is not None:
            raise ConfigError("learning_rate and learning_rate_multiplier exclude each other", hint="Give one of them.")
    sample_count(request)
    settings = {name: value for name, value in request.settings.items() if name != SAMPLES}
    if request.seed is not None:
        settings.setdefault("seed", request.seed)
    fixed = {"name": "new", "data": "", "valid": None, "from": parent and str(parent)}
    return job_recipe(settings, SETTINGS, **fixed)


def sample_count(request: JobRequest) -> int:
    """Return how many validation prompts a job's adapter answers at each evaluation.

    Raises:
        ConfigError: it is not a number from 0 to MOST_SAMPLES.
    """
    count = request.settings.get(SAMPLES, 0)
    if type(count) is not int or not 0 <= count <= MOST_SAMPLES:
        raise ConfigError(f"{SETTINGS}.{SAMPLES} must be an integer from 0 to {MOST_SAMPLES}, not {count!r:.40}")
    return count


def run_recipe(record: JobRecord, base: Base, config: LiveConfig, folder: JobFolder) -> RunRecipe:
    """Return the recipe of a job's run in its folder.

    Raises:
        ConfigError: its settings are invalid, or its training file is gone.
    """
    request = record.request
    paths = {kind: folder.taken(kind) for kind in (TRAINING, VALIDATION, PARENT)}
    data, valid, parent = paths.values()
    if data is None:
        raise ConfigError(f"the file {request.training_file} was deleted", hint="Upload it again.")
    recipe = check_settings(request, parent)
    job = replace(recipe, name=record.id, data=str(data), valid=None if valid is None else str(valid))
    begun = folder.path / RUN_FILE
    shared = PassConfig(
        # Part of the bits, so a job keeps what it began with.
        max_tokens=read_recipe(begun).shared.max_tokens if begun.exists() else config.train_tokens,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=1,
        samples=sample_count(request),
    )
    return RunRecipe(base=base.source, task=base.task, shared=shared, jobs=(job,))
