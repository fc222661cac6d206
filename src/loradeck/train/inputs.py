"""What a run reads besides its base: checked before the base is loaded, which takes longer."""

from collections.abc import Container
from dataclasses import fields, replace
from pathlib import Path

from loradeck.dataset.source import find
from loradeck.errors import ConfigError
from loradeck.lora import hub
from loradeck.lora.config import LoraConfig
from loradeck.lora.manifest import AdapterFiles, read_folder
from loradeck.train.recipe import JobRecipe, RunRecipe


def with_parents(recipe: RunRecipe) -> RunRecipe:
    """Return a run whose jobs go on from folders: adapters of the hub are downloaded.

    Raises:
        AdapterError: as `hub.local`.
    """
    jobs = (job if job.from_ is None else replace(job, from_=str(hub.local(job.from_))) for job in recipe.jobs)
    return replace(recipe, jobs=tuple(jobs))


def check_inputs(recipe: RunRecipe, folder: Path, given: Container[str] = ()) -> None:
    """Check that a run's datasets and the adapters that it goes on from exist; `folder` is the run's.

    `given` are settings of the adapters that count even where they have the default's value.

    Raises:
        DataError: a dataset does not exist, or is of no known kind.
        AdapterError: an adapter is not valid.
        ConfigError: an adapter is in the way of the run's own, or its settings differ from the job's.
    """
    for source in dict.fromkeys(source for job in recipe.jobs for source in (job.data, job.valid) if source):
        find(source)
    for job in recipe.jobs:
        if job.from_ is None:
            continue
        read_parent(job, given)
        if Path(job.from_).resolve() in (folder.resolve(), (folder / job.name).resolve()):
            raise ConfigError(
                f"{job.from_} is where the new adapter would be written", hint="Write the new one to another folder."
            )


def read_parent(job: JobRecipe, given: Container[str] = ()) -> AdapterFiles:
    """Read the headers of the adapter that a job goes on from; `given` is as in check_inputs.

    Raises:
        AdapterError: it is not valid.
        ConfigError: the job's settings differ from the adapter's; each is named.
    """
    assert job.from_ is not None
    files = read_folder(job.from_)
    problems = [
        f"{field.name} is {_text(new)}, the adapter has {_text(old)}"
        for field in fields(LoraConfig)
        if not _same(new := getattr(job.lora, field.name), old := getattr(files.config, field.name))
        and (field.name in given or new != getattr(LoraConfig(), field.name))
    ]
    if job.last_layers is not None:
        problems.append(f"last_layers is {job.last_layers}, the adapter has its modules already")
    if problems:
        raise ConfigError(
            f"{job.name} cannot go on from {job.from_} with other settings",
            problems,
            hint="Leave them out: the adapter's own apply.",
        )
    return files


def parent_name(folder: Path) -> str:
    """Return the name of an adapter that a job goes on from: its folder's, or owner/name@commit in the hub's cache."""
    name = hub.with_hub_ids(str(folder))
    return folder.name if name == str(folder) else name


def _same(new: object, old: object) -> bool:
    """Compare two values of a setting; names of modules count in any order."""
    if isinstance(new, tuple) and isinstance(old, tuple):
        return sorted(map(str, new)) == sorted(map(str, old))
    return new == old


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
