"""`loradeck sweep`: many settings in one pass; the best adapter is kept."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

from loradeck.cli.display.text import columns, printable
from loradeck.cli.options import Dtype, Task, TrainingWeights
from loradeck.cli.train import (
    DEFAULTS,
    LORA,
    READING,
    RECIPE,
    SHARED,
    carry_out,
    check_output,
    command_to_try,
    read_run,
    suffixes,
)
from loradeck.dataset.config import DataConfig
from loradeck.errors import ConfigError, TrainingError
from loradeck.lora.config import LoraConfig
from loradeck.train.config import PassConfig, TrainConfig
from loradeck.train.recipe import JobRecipe, RunRecipe, resolve, resolve_base

if TYPE_CHECKING:
    from loradeck.train.run import Run
T = TypeVar("T", int, float)

# All flags of train but those that a sweep varies or sets itself.
LORA_FLAGS = re.compile("^(lora|lora_alpha|lora_dropout|target_modules|use_rslora)$")
RECIPE_FLAGS = re.compile("^(?!learning_rate$|patience$)")


def sweep(
    base: str | None = None,
    dataset: str | None = None,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    lr: str | None = None,
    r: str | None = None,
    reading: Annotated[DataConfig, Parameter(name="*")] = READING,
    lora: Annotated[LoraConfig, Parameter(name="*", parse=LORA_FLAGS)] = LORA,
    recipe: Annotated[TrainConfig, Parameter(name="*", parse=RECIPE_FLAGS)] = RECIPE,
    shared: Annotated[PassConfig, Parameter(name="*")] = SHARED,
    valid: str | None = None,
    task: Task = "generate",
    dtype: Dtype = "auto",
    weights: TrainingWeights = "packed",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Try learning rates and ranks in one pass, and keep the best.

    Every rate is tried at every rank. At regular steps after the warm-up
    the worse half of the trials, by validation loss, is stopped; the rest run
    to the end. The folder
    then contains the best adapter. If the dataset has no validation examples, a
    tenth of it is held out.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        dataset: A file, a folder with train, valid and test, or a hub id.
        output: The run's folder, whose name is the adapter's.
        lr: Comma-separated learning rates, such as 1e-4,3e-4,1e-3.
        r: Comma-separated ranks, such as 4,16.
        valid: A dataset for validation.
        dry_run: Print the plan without training.
        resume: Resume the sweep in the folder.
        overwrite: Replace an existing adapter or run.
    """
    from loradeck.train.sweep import HELD_OUT, halve, trials

    if resume:
        arguments = (base, dataset, lr, r, reading, lora, recipe, shared, valid, task, dtype, weights)
        if arguments != (None, None, None, None, *DEFAULTS, None, "generate", "auto", "packed"):
            raise ConfigError("--resume takes no other settings", hint="Resume with only --output and --resume.")
        run_recipe = read_run(output, sweep=True)
        if say_finished(output):
            return 0
    elif base is None or dataset is None:
        raise ConfigError(
            "a base and a dataset are needed", hint="loradeck sweep BASE DATASET -o FOLDER --lr 1e-4,3e-4"
        )
    else:
        check_output(output, overwrite=overwrite)
        recipe = replace(recipe, valid_ratio=recipe.valid_ratio or HELD_OUT)
        job = JobRecipe(
            name=output.resolve().name,
            data=resolve(dataset),
            valid=valid and resolve(valid),
            reading=reading,
            lora=suffixes(lora),
            train=recipe,
        )
        jobs = trials(job, numbers("--lr", lr, float), numbers("--r", r, int))
        run_recipe = RunRecipe(
            base=resolve_base(base), dtype=dtype, weights=weights, task=task, shared=shared, jobs=jobs, sweep=True
        )
    run = carry_out(run_recipe, output, resume=resume, dry_run=dry_run, each_pass=halve)
    return 0 if dry_run else conclude(run, run_recipe)


def say_finished(folder: Path) -> bool:
    """If a sweep is finished and its best adapter published, say so; return whether it is so."""
    from loradeck.lora.manifest import is_adapter
    from loradeck.train import checkpoint
    from loradeck.train.run import CHECKPOINTS

    state = checkpoint.finished(folder / CHECKPOINTS)
    if state is None or not is_adapter(folder):
        return False
    losses = {name: job.best_loss for name, job in state.jobs.items() if job.best_loss is not None}
    name = min(losses, key=lambda name: losses[name])
    print(printable(f"{folder}: finished, the adapter of {name} with a validation loss of {losses[name]:.4f}"))
    return True


def conclude(run: "Run", recipe: RunRecipe) -> int:
    """Publish the best trial's adapter and print a table of all trials; return the exit code.

    Raises:
        TrainingError: no trial has a validation loss.
    """
    from loradeck.train.sweep import best

    if run.trainer.interrupted:
        print(printable("resume: " + shlex.join(["loradeck", "sweep", "--output", str(run.folder), "--resume"])))
        return 130
    winner = best(run.trainer)
    if winner is None:
        raise TrainingError("no trial has a validation loss", hint="Try lower learning rates.")
    run.save(winner, run.folder)
    rows = [("trial", "loss", "at step", "ended")]
    for name, job in sorted(run.trainer.jobs.items(), key=lambda item: item[1].progress.best_loss or float("inf")):
        progress = job.progress
        loss = "none" if progress.best_loss is None else f"{progress.best_loss:.4f}"
        why = f"{progress.end.reason} {progress.end.detail.partition(chr(10))[0]}" if progress.end else ""
        rows.append((name, loss, str(progress.best_step), why.strip()))
    print(columns(rows, right={1, 2}))
    print(printable(f"{run.folder}: the adapter of {winner}"))
    print(printable("try: " + command_to_try(recipe, run.folder)))
    return 0


def numbers(flag: str, text: str | None, kind: Callable[[str], T]) -> list[T]:
    """Return comma-separated numbers; none if there is no text.

    Raises:
        ConfigError: invalid number.
    """
    try:
        return [kind(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: {error}", hint="Give comma-separated numbers.") from error
