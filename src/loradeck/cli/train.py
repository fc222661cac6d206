"""`loradeck train`: datasets and a base into adapters' folders. Decides what is written; trains nothing itself."""

import re
import shlex
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from loradeck.cli.imports import heavy
from loradeck.cli.options import Dtype
from loradeck.cli.screen import shown, size
from loradeck.cli.writers import Kind
from loradeck.errors import AdapterError, ConfigError, TrainingError
from loradeck.lora.config import LoraConfig
from loradeck.train.config import PassConfig, TrainConfig
from loradeck.train.recipe import RUN_FILE, JobRecipe, RunRecipe, read_recipe, resolve, resolve_base

if TYPE_CHECKING:
    from collections.abc import Callable

    from loradeck.base.load import Base
    from loradeck.train.events import AnyEvent, Listener
    from loradeck.train.run import Answer, Run
    from loradeck.train.trainer import Trainer

# The settings of an adapter that are flags here; patterns for single modules are for run files and Python.
FLAGS = re.compile("^(lora|r|lora_alpha|lora_dropout|target_modules|use_rslora)$")
LORA, RECIPE, SHARED = LoraConfig(), TrainConfig(), PassConfig()
ANSWER_TOKENS = 48


def train(
    base: str | None = None,
    dataset: str | None = None,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    lora: Annotated[LoraConfig, Parameter(name="*", parse=FLAGS)] = LORA,
    recipe: Annotated[TrainConfig, Parameter(name="*")] = RECIPE,
    shared: Annotated[PassConfig, Parameter(name="*")] = SHARED,
    valid: str | None = None,
    last_layers: int | None = None,
    dtype: Dtype = "auto",
    log: Kind | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Train an adapter on a dataset, or all adapters of a run file in one pass.

    `loradeck train BASE DATASET -o FOLDER` trains one adapter. `loradeck train
    RUN.toml -o FOLDER` trains one for each [[adapter]] of the file, all at
    once (docs/training.md). --target-modules takes modules' names with commas
    between them, as in q_proj,v_proj, or what its help says. Ctrl-C ends the
    training after its step, with a checkpoint; --resume goes on to the same
    bits, also after a crash.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m; or a run file.
        dataset: A file, a folder with train, valid and test, or a hub id.
        output: The run's folder; the name of a single adapter.
        valid: A dataset to validate on.
        last_layers: Adapt only so many layers, from the last.
        log: Write metrics for this program too.
        dry_run: Print the plan and train nothing.
        resume: Go on with the run in the folder.
        overwrite: Replace an adapter or a run that is already there.
    """
    if base is not None and base.endswith(".toml") and dataset is None:
        if (lora, recipe, shared, valid, last_layers, dtype) != (LORA, RECIPE, SHARED, None, None, "auto"):
            raise ConfigError("settings are given beside a run file", hint="Write them into the file.")
        wanted = read_recipe(base)
    elif base is not None and dataset is not None:
        job = JobRecipe(
            name=output.resolve().name,
            data=resolve(dataset),
            valid=valid and resolve(valid),
            last_layers=last_layers,
            lora=suffixes(lora),
            train=recipe,
        )
        wanted = RunRecipe(base=resolve_base(base), dtype=dtype, shared=shared, jobs=(job,))
    elif resume and base is None:
        wanted = None
    else:
        raise ConfigError("no base and dataset", hint="loradeck train BASE DATASET -o FOLDER, or RUN.toml -o FOLDER.")
    if resume:
        stored = read_run(output, sweep=False)
        if wanted is not None:
            check_same(wanted, stored)
        wanted = stored
    else:
        check_output(output, overwrite=overwrite)
    assert wanted is not None
    run = carry_out(wanted, output, resume=resume, dry_run=dry_run, log=log)
    return 0 if dry_run else conclude(run, wanted.base)


def carry_out(
    recipe: RunRecipe,
    output: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    log: Kind | None = None,
    listener: "Listener | None" = None,
    each_pass: "Callable[[Trainer], None] | None" = None,
) -> "Run":
    """Train what a recipe says into a folder; return the run, which has no event yet after a dry one."""
    from rich.console import Console

    with heavy():
        from loradeck.base.load import Base
        from loradeck.base.onednn import MANY, keep
        from loradeck.cli.live_view import progress, table
        from loradeck.cli.plan import plan
        from loradeck.cli.writers import metric_writer
        from loradeck.train.run import Run

    console = Console()
    keep(MANY)
    base = Base.load(recipe.base, dtype=recipe.dtype, weights="packed")
    run = Run(recipe, output, base)
    run.answer = answerer(base, run)
    for name in run.data:
        console.print(table(plan(run, name)))
    if dry_run:
        return run
    with ExitStack() as stack:
        listeners = [listener] if listener else []
        if log is not None:
            listeners.append(stack.enter_context(metric_writer(log, output)))
        if resume:
            print(shown(f"resumed {output} after {run.resume()} passes"))
        else:
            run.begin()
        steps = {name: job.schedule.steps for name, job in run.trainer.jobs.items()}
        listeners.append(stack.enter_context(progress(console, steps)))

        def tell(event: "AnyEvent") -> None:
            for hear in listeners:
                hear(event)

        run.on_event = tell
        run.train(each_pass)
    return run


def answerer(base: "Base", run: "Run") -> "Answer":
    """Return a way for adapters in training to answer prompts."""
    from loradeck.generation import generate

    return lambda names, prompts: generate(base, run.bank, prompts, names, max_new_tokens=ANSWER_TOKENS)


def conclude(run: "Run", base: str) -> int:
    """Say what came out of a run, and what to do next; return the exit code."""
    ends = {name: job.progress for name, job in run.trainer.jobs.items()}
    for name, done in ends.items():
        end = done.end
        assert end is not None
        place, losses = run.adapter_folder(name), done.losses
        if end.kept and place.joinpath("adapter_config.json").exists():
            best = f", best validation loss {done.best_loss:.4f} at step {end.kept}" if done.best_loss else ""
            print(
                shown(
                    f"{place}: {size(run.bank[name].nbytes)}, {end.reason} after {end.step} steps, loss "
                    f"{losses[0]:.3f} -> {losses[-1]:.3f}{best}"
                )
            )
        if end.detail or not losses:
            print(shown(f"{name}: {end.reason}: {end.detail or 'before the first step; nothing was saved'}"))
    seconds = run.trainer.seconds
    tokens = sum(done.tokens for done in ends.values())
    print(f"{tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s")
    if run.trainer.interrupted:
        print(shown("go on: " + shlex.join(["loradeck", "train", "--output", str(run.folder), "--resume"])))
        return 130
    if any(done.end is not None and done.end.reason == "diverged" for done in ends.values()):
        return 1
    adapter = str(run.adapter_folder(next(iter(ends))))
    print(shown("try: " + shlex.join(["loradeck", "generate", base, "Hello!", "--adapter", adapter])))
    return 0


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Find out before hours of training whether the adapter can be saved.

    Raises:
        AdapterError: the folder is a file, holds an adapter, or cannot be written.
        TrainingError: it holds a run.
    """
    import tempfile

    from loradeck.lora.manifest import is_adapter

    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file", hint="Name a folder.")
    if not overwrite:
        if (folder / RUN_FILE).exists():
            raise TrainingError(
                f"{folder} holds a run", hint="Go on with it: --resume. Begin anew in its place: --overwrite."
            )
        if folder.is_dir() and is_adapter(folder):
            raise AdapterError(f"{folder} holds an adapter", hint="Name another folder, or pass --overwrite.")
    place = next(parent for parent in folder.resolve().parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=place, prefix=".loradeck-").cleanup()
    except OSError as error:
        raise AdapterError(f"{folder} cannot be written: {place}: {error.strerror}", hint="Name another.") from error


def read_run(folder: Path, *, sweep: bool) -> RunRecipe:
    """Read the recipe of a folder's run.

    Raises:
        TrainingError: there is none, or another verb goes on with it.
        ConfigError: as read_recipe.
    """
    if not (folder / RUN_FILE).exists():
        raise TrainingError(f"{folder} holds no run", hint="Begin one: loradeck train BASE DATASET -o FOLDER.")
    stored = read_recipe(folder / RUN_FILE)
    if stored.sweep != sweep:
        verb, kind = ("sweep", "a sweep") if stored.sweep else ("train", "no sweep")
        go_on = shlex.join(["loradeck", verb, "--output", str(folder), "--resume"])
        raise TrainingError(f"the run in {folder} is {kind}", hint=f"Go on with it by {go_on}.")
    return stored


def check_same(wanted: RunRecipe, stored: RunRecipe) -> None:
    """Refuse to resume a run with settings that are not its own; what was left at its default is not a wish.

    Raises:
        ConfigError: naming each setting and both values.
    """
    problems = _differences(wanted, stored, ("base", "dtype")) + _differences(wanted.shared, stored.shared)
    if [job.name for job in wanted.jobs] != [job.name for job in stored.jobs]:
        problems.append("the adapters are not the run's")
    else:
        for job, old in zip(wanted.jobs, stored.jobs, strict=True):
            problems += _differences(job.lora, old.lora) + _differences(job.train, old.train)
            problems += _differences(job, old, ("last_layers",))
            problems += [
                f"{key} is {new!r}, the run has {before!r}"
                for key, new, before in (("dataset", job.data, old.data), ("valid", job.valid, old.valid))
                if new is not None and (before is None or Path(new).resolve() != Path(before).resolve())
            ]
    if problems:
        raise ConfigError(
            "this is not the run in the folder", problems, hint="Resume it by --output and --resume alone."
        )


def _differences(new: Any, old: Any, names: tuple[str, ...] = ()) -> list[str]:
    defaults = {field.name: field.default for field in fields(new)}
    return [
        f"{name} is {getattr(new, name)!r}, the run has {getattr(old, name)!r}"
        for name in names or defaults
        if getattr(new, name) not in (getattr(old, name), defaults[name])
    ]


def suffixes(config: LoraConfig) -> LoraConfig:
    """Take a plain word for a module's name, and words with commas for several; all else is as in LoraConfig."""
    words = config.target_modules
    if isinstance(words, str) and words != "attention" and re.fullmatch(r"[\w.]+(,[\w.]+)*", words):
        return replace(config, target_modules=words.split(","))
    return config
