"""A run's state on disk, from which it resumes to the same bits.

What a step does depends on the adapter's tensors, the optimizer's moments and the step's number alone: the order of
the examples and the dropout masks are functions of the seed and the step. So no generator's state is saved.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loradeck.disk import new_folder
from loradeck.errors import TrainingError
from loradeck.train.job import Job, Progress
from loradeck.train.trainer import Trainer

STATE = "state.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # torch.optim.AdamW's
HINT = "Remove it, and the checkpoint before it is used."
PACKAGES = ("torch", "transformers")


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A run's state without its tensors."""

    passes: int
    seconds: float
    fingerprint: str
    """Of the base."""
    jobs: dict[str, Progress]
    data: dict[str, str]
    """The sha256 of each job's dataset."""
    parents: dict[str, str] = {}
    """The sha256 of the adapter that a job goes on from."""
    files: dict[str, int]
    """The size in bytes of each file that the run appends to."""
    versions: dict[str, str]


def save(
    trainer: Trainer,
    folder: Path,
    *,
    data: Mapping[str, str],
    parents: Mapping[str, str],
    files: Mapping[str, int],
    keep: int,
) -> Path:
    """Write a checkpoint into `folder`, atomically, and remove all but the newest `keep`."""
    path = folder / f"{trainer.passes:08}"
    state = State(
        passes=trainer.passes,
        seconds=trainer.seconds,
        fingerprint=trainer.base.fingerprint,
        jobs={name: job.progress for name, job in trainer.jobs.items()},
        data=dict(data),
        parents=dict(parents),
        files=dict(files),
        versions={package: version(package) for package in PACKAGES},
    )
    with new_folder(path) as new:
        for name, job in trainer.jobs.items():
            save_file(_tensors(job), new / f"{name}.safetensors")
        (new / STATE).write_bytes(msgspec.json.encode(state))
    prune(folder, keep)
    return path


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest last; one that a kill interrupted has another name."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / STATE).is_file())


def finished(folder: Path) -> State | None:
    """Return the newest state in a folder if all its jobs have ended."""
    paths = checkpoints(folder)
    state = read(paths[-1]) if paths else None
    return state if state and all(job.end for job in state.jobs.values()) else None


def read(path: Path) -> State:
    """Read a checkpoint's state.

    Raises:
        TrainingError: the checkpoint is damaged.
    """
    try:
        return msgspec.json.decode((path / STATE).read_bytes(), type=State)
    except (OSError, msgspec.DecodeError) as error:
        raise TrainingError(f"{path} cannot be resumed from: {error}", hint=HINT) from error


@torch.no_grad()
def restore(trainer: Trainer, path: Path, state: State, *, data: Mapping[str, str], parents: Mapping[str, str]) -> None:
    """Restore a trainer with new jobs to the state in a checkpoint.

    Raises:
        TrainingError: the base, a dataset, an adapter or the one that it goes on from differs from the checkpoint's,
            or the checkpoint is damaged.
    """
    problems = [] if state.fingerprint == trainer.base.fingerprint else ["the base is a different one"]
    problems += [f"{name}: its dataset has changed" for name in data if data[name] != state.data.get(name)]
    problems += [
        f"{name}: the adapter that it goes on from has changed"
        for name in parents
        if parents[name] != state.parents.get(name)
    ]
    problems += [
        f"{name}: it has taken {state.jobs[name].step} steps already, more than {job.schedule.steps}"
        for name, job in trainer.jobs.items()
        if state.jobs[name].step > job.schedule.steps
    ]
    if problems:
        raise TrainingError(
            f"{path} cannot be resumed from", problems, hint="Restore what has changed, or begin a new run."
        )
    for name, job in trainer.jobs.items():
        try:
            _load_tensors(job, load_file(path / f"{name}.safetensors"))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise TrainingError(f"{path} cannot be resumed from: {name}: {error}", hint=HINT) from error
        job.progress = state.jobs[name]
        if job.can_go_on:
            job.progress.end = None
        elif not job.running:
            job.keep_best()
    trainer.passes, trainer.seconds_before = state.passes, state.seconds


def _tensors(job: Job) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    goes_on = job.running or job.finished
    for key, parameter in job.adapter.tensors():
        tensors[f"weight {key}"] = job.last.get(key, parameter).detach().contiguous()
        moments = job.optimizer.state.get(parameter, {}) if goes_on else {}  # type: ignore[call-overload]
        tensors.update({f"{name} {key}": moments[name] for name in MOMENTS if name in moments})
    tensors.update({f"best {key}": tensor for key, tensor in job.best.items()})
    return tensors


def _load_tensors(job: Job, tensors: Mapping[str, Tensor]) -> None:
    for key, parameter in job.adapter.tensors():
        parameter.copy_(tensors[f"weight {key}"])
        moments = {name: tensors[f"{name} {key}"] for name in MOMENTS if f"{name} {key}" in tensors}
        if moments:
            job.optimizer.state[parameter] = {name: moment.to(parameter.device) for name, moment in moments.items()}
    job.best = {
        key.removeprefix("best "): tensor.to(next(job.adapter.parameters()).device)
        for key, tensor in tensors.items()
        if key.startswith("best ")
    }
