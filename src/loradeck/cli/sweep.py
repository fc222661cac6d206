"""`loradeck sweep`: many settings in one pass, the best adapter under the asked name. Trains nothing itself."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

from loradeck.cli.options import Dtype
from loradeck.cli.screen import columns, shown
from loradeck.cli.train import LORA, RECIPE, SHARED, carry_out, check_output, read_run, suffixes
from loradeck.errors import ConfigError, TrainingError
from loradeck.lora.config import LoraConfig
from loradeck.train.config import PassConfig, TrainConfig
from loradeck.train.recipe import JobRecipe, RunRecipe, resolve, resolve_base

if TYPE_CHECKING:
    from loradeck.train.run import Run
T = TypeVar("T", int, float)

# All but what a sweep tries, or decides itself.
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
    lora: Annotated[LoraConfig, Parameter(name="*", parse=LORA_FLAGS)] = LORA,
    recipe: Annotated[TrainConfig, Parameter(name="*", parse=RECIPE_FLAGS)] = RECIPE,
    shared: Annotated[PassConfig, Parameter(name="*")] = SHARED,
    valid: str | None = None,
    dtype: Dtype = "auto",
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Try several learning rates and ranks in one pass, and keep the best.

    Every rate is tried at every rank. Trials with the higher validation losses
    are stopped, half of them each time; the last ones run to the end. The
    folder is then the best one's adapter. A dataset without validation
    examples has a tenth held out.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        dataset: A file, a folder with train, valid and test, or a hub id.
        output: The run's folder; the name of the best adapter.
        lr: Learning rates with commas between them, as in 1e-4,3e-4,1e-3.
        r: Ranks with commas between them, as in 4,16.
        valid: A dataset to validate on.
        dry_run: Print the plan and train nothing.
        resume: Go on with the sweep in the folder.
        overwrite: Replace an adapter or a run that is already there.
    """
    from loradeck.train.sweep import HELD_OUT, Halving, trials

    if resume:
        given = (base, dataset, lr, r, lora, recipe, shared, valid, dtype)
        if given != (None, None, None, None, LORA, RECIPE, SHARED, None, "auto"):
            raise ConfigError("settings are given beside --resume", hint="Resume it by --output and --resume alone.")
        wanted = read_run(output, sweep=True)
    elif base is None or dataset is None:
        raise ConfigError("no base and dataset", hint="loradeck sweep BASE DATASET -o FOLDER --lr 1e-4,3e-4.")
    else:
        check_output(output, overwrite=overwrite)
        recipe = replace(recipe, valid_ratio=recipe.valid_ratio or HELD_OUT)
        job = JobRecipe(
            name=output.resolve().name,
            data=resolve(dataset),
            valid=valid and resolve(valid),
            lora=suffixes(lora),
            train=recipe,
        )
        tried = trials(job, numbers("--lr", lr, float), numbers("--r", r, int))
        wanted = RunRecipe(base=resolve_base(base), dtype=dtype, shared=shared, jobs=tried, sweep=True)
    halving = Halving()
    run = carry_out(wanted, output, resume=resume, dry_run=dry_run, listener=halving.on_event, each_pass=halving)
    return 0 if dry_run else conclude(run, wanted.base)


def conclude(run: "Run", base: str) -> int:
    """Publish the best trial's adapter, and say how all of them did; return the exit code.

    Raises:
        TrainingError: no trial came to a validation loss.
    """
    from loradeck.train.sweep import best

    if run.trainer.interrupted:
        print(shown("go on: " + shlex.join(["loradeck", "sweep", "--output", str(run.folder), "--resume"])))
        return 130
    winner = best(run.trainer)
    if winner is None:
        raise TrainingError("no trial came to a validation loss", hint="Try lower learning rates.")
    run.save(winner, run.folder)
    rows = [("trial", "loss", "at step", "ended")]
    for name, job in sorted(run.trainer.jobs.items(), key=lambda item: item[1].progress.best_loss or float("inf")):
        done = job.progress
        loss = "none" if done.best_loss is None else f"{done.best_loss:.4f}"
        why = f"{done.end.reason} {done.end.detail.partition(chr(10))[0]}" if done.end else ""
        rows.append((name, loss, str(done.best_step), why.strip()))
    print(columns(rows, right={1, 2}))
    print(shown(f"{run.folder}: the adapter of {winner}"))
    print(shown("try: " + shlex.join(["loradeck", "generate", base, "Hello!", "--adapter", str(run.folder)])))
    return 0


def numbers(flag: str, text: str | None, kind: Callable[[str], T]) -> list[T]:
    """Read numbers with commas between them; none where there is no text.

    Raises:
        ConfigError: one of them is none.
    """
    try:
        return [kind(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: {error}", hint="Give numbers with commas between them.") from error
