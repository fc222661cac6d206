"""`loradeck train`: train adapters on datasets and write them to folders."""

import re
import shlex
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter

from loradeck.cli.display.reading_progress import reading_progress
from loradeck.cli.display.text import format_size, printable
from loradeck.cli.options import Dtype, Task, TrainingWeights, is_typed, typed_without
from loradeck.cli.output import check_writable
from loradeck.cli.process import cap_allocator, quick_imports
from loradeck.cli.writers import Kind
from loradeck.dataset.config import DataConfig
from loradeck.errors import AdapterError, ConfigError, TrainingError
from loradeck.lora.config import LoraConfig
from loradeck.train.config import PassConfig, TrainConfig
from loradeck.train.recipe import RUN_FILE, JobRecipe, RunRecipe, read_recipe, resolve, resolve_base

if TYPE_CHECKING:
    from collections.abc import Callable

    from loradeck.base import task as base_task
    from loradeck.base.load import Base
    from loradeck.base.weights import Weights
    from loradeck.train.events import AnyEvent, Listener
    from loradeck.train.job import Progress
    from loradeck.train.run import Answer, Run
    from loradeck.train.trainer import Trainer

# The fields of LoraConfig that are flags; patterns for single modules are for run files and Python.
FLAGS = re.compile("^(lora|r|lora_alpha|lora_dropout|target_modules|use_rslora)$")
DEFAULTS = READING, LORA, RECIPE, SHARED = DataConfig(), LoraConfig(), TrainConfig(), PassConfig()
EXTENDED = ("epochs", "max_steps")  # what --resume may raise
RECIPE_NAMES = tuple(field.name for field in fields(TrainConfig) if field.name not in EXTENDED)
ANSWER_TOKENS = 48


def train(
    base: str | None = None,
    dataset: str | None = None,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    reading: Annotated[DataConfig, Parameter(name="*")] = READING,
    lora: Annotated[LoraConfig, Parameter(name="*", parse=FLAGS)] = LORA,
    recipe: Annotated[TrainConfig, Parameter(name="*")] = RECIPE,
    shared: Annotated[PassConfig, Parameter(name="*")] = SHARED,
    valid: str | None = None,
    from_: str | None = None,
    last_layers: int | None = None,
    task: Task = "generate",
    dtype: Dtype = "auto",
    weights: TrainingWeights = "packed",
    log: Kind | None = None,
    shard_base: bool = False,
    ray: bool = False,
    workers: int = 2,
    ray_address: str | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Train an adapter, or all adapters of a run file in one pass.

    `loradeck train BASE DATASET -o FOLDER` trains one adapter. `loradeck train
    RUN.toml -o FOLDER` trains one for each [[adapter]] of the file, all at
    once (docs/training.md). --target-modules takes comma-separated names of
    modules, such as q_proj,v_proj, or one of the values below. Ctrl-C stops
    after the current step and saves a checkpoint; --resume continues from the
    last checkpoint, also after a crash, with the same result bit for bit. With
    more --epochs or --max-steps it trains a finished run on.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m; or a run file.
        dataset: A file, a folder with train, valid and test, or a hub id.
        output: The run's folder, whose name is that of a single adapter.
        valid: A dataset for validation.
        from_: The folder or hub id of an adapter to go on from, with its
            settings, instead of a new one.
        last_layers: Adapt only the last N layers.
        log: Also write metrics for this program.
        shard_base: Divide the layers of a base with plain weights over the
            processes of torchrun, for a base that does not fit into each.
        ray: Train by the workers of a Ray cluster. See docs/training.md.
        workers: How many, with --ray.
        ray_address: A Ray cluster to join, as host:port or ray://host:port; by
            default RAY_ADDRESS, or a cluster started here.
        dry_run: Print the plan without training.
        resume: Resume the run in the folder.
        overwrite: Replace an existing adapter or run.
    """
    from loradeck.train.inputs import with_parents

    settings: dict[str, Any] = {
        "valid": valid and resolve(valid),
        "from_": from_ and resolve(from_),
        "last_layers": last_layers,
        "reading": reading,
        "lora": suffixes(lora),
        "train": recipe,
    }
    if base is not None and base.endswith(".toml") and dataset is None:
        flags = (reading, lora, recipe, shared, valid, from_, last_layers, task, dtype, weights)
        if flags != (*DEFAULTS, None, None, None, "generate", "auto", "packed"):
            raise ConfigError("a run file takes no other settings", hint="Write them into the file.")
        run_recipe = read_recipe(base)
    elif base is not None and dataset is not None:
        job = JobRecipe(name=output.resolve().name, data=resolve(dataset), **settings)
        run_recipe = RunRecipe(
            base=resolve_base(base), dtype=dtype, weights=weights, task=task, shared=shared, jobs=(job,)
        )
    elif resume and base is None:
        stored = read_run(output, sweep=False)
        jobs = tuple(replace(job, **settings) for job in stored.jobs)
        run_recipe = replace(stored, dtype=dtype, weights=weights, task=task, shared=shared, jobs=jobs)
    else:
        raise ConfigError(
            "a base and a dataset are needed", hint="loradeck train BASE DATASET -o FOLDER, or RUN.toml -o FOLDER"
        )
    run_recipe = with_parents(run_recipe)
    if resume:
        stored = with_parents(read_run(output, sweep=False))
        check_same(run_recipe, stored)
        run_recipe = extended(stored, run_recipe)
        if run_recipe == stored and say_finished(stored, output):
            return 0
    else:
        check_output(output, overwrite=overwrite)
    if ray and not dry_run:
        from loradeck.cli import main
        from loradeck.scale.train import train_on_ray

        check_inputs_of(run_recipe, output)
        arguments = typed_without({"--ray": 0, "--workers": 1, "--ray-address": 1})
        train_on_ray(main, arguments, workers=workers, address=ray_address)
        return 0
    run = carry_out(run_recipe, output, resume=resume, dry_run=dry_run, log=log, shard_base=shard_base)
    return 0 if dry_run else conclude(run, run_recipe)


def carry_out(
    recipe: RunRecipe,
    output: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    log: Kind | None = None,
    shard_base: bool = False,
    each_pass: "Callable[[Trainer], None] | None" = None,
) -> "Run":
    """Run a recipe in a folder and return the run; a dry run only prints its plan.

    Of the processes that torchrun has started, each takes its share of the training.
    """
    from rich.console import Console

    with quick_imports():
        from loradeck.base.load import Base
        from loradeck.cli.display.live_view import plan_table, progress
        from loradeck.cli.display.trials import trial_columns
        from loradeck.cli.writers import metric_writer
        from loradeck.train.group import process_group
        from loradeck.train.plan import plan
        from loradeck.train.run import Run

    check_inputs_of(recipe, output)
    console = Console()
    weights, task = cast("Weights", recipe.weights), cast("base_task.Task", recipe.task)
    with ExitStack() as stack:
        group = stack.enter_context(process_group())
        device = "cpu" if shard_base else group.device
        base = Base.load(recipe.base, dtype=recipe.dtype, device=device, weights=weights, task=task)
        if shard_base:
            from loradeck.train.sharding import shard_layers

            cap_allocator()  # layers come and go
            shard_layers(base.model, group)
        with reading_progress() as on_read:
            run = Run(recipe, output, base, group=group, on_read=on_read)
        run.answer = answerer(base, run) if task == "generate" else None
        names = list(run.data)
        for name in names[:1] if recipe.sweep else names:
            console.print(plan_table(plan(run, name)))
        if recipe.sweep:
            print(f"\n{len(names)} trials, each as above except for:\n{trial_columns(run)}")
        if dry_run:
            return run
        listeners: list[Listener] = []
        if log is not None and group.rank == 0:
            listeners.append(stack.enter_context(metric_writer(log, output)))
        if resume:
            passes = run.resume()
            print(printable(f"resumed {output} after {passes} pass{'es' * (passes != 1)}"))
            for job in run.trainer.running:
                step, steps = job.progress.step, job.schedule.steps
                rate = f"{job.schedule(step):.2g}"
                print(printable(f"{job.name}: next is step {step + 1} of {steps}, at a learning rate of {rate}"))
        else:
            run.begin()
        steps = {name: job.schedule.steps for name, job in run.trainer.jobs.items()}
        listeners.append(stack.enter_context(progress(console, steps)))

        def on_event(event: "AnyEvent") -> None:
            for listen in listeners:
                listen(event)

        run.on_event = on_event
        run.train(each_pass)
    return run


def check_inputs_of(recipe: RunRecipe, output: Path) -> None:
    """Check that a run's datasets and adapters exist: see `check_inputs`."""
    from loradeck.train.inputs import check_inputs

    check_inputs(recipe, output, [field.name for field in fields(LoraConfig) if is_typed(field.name)])


def answerer(base: "Base", run: "Run") -> "Answer":
    """Return a function that answers prompts with the adapters in training."""
    from loradeck.generation import generate

    return lambda names, prompts: generate(base, run.bank, prompts, names, max_new_tokens=ANSWER_TOKENS)


def conclude(run: "Run", recipe: RunRecipe) -> int:
    """Print the results of a run and the next command to try; return the exit code."""
    results = {name: job.progress for name, job in run.trainer.jobs.items()}
    for name, progress in results.items():
        end = progress.end
        assert end is not None
        folder = run.adapter_folder(name)
        if end.kept and folder.joinpath("adapter_config.json").exists():
            print(printable(f"{folder}: {format_size(run.bank[name].nbytes)}, {outcome(progress)}"))
        if end.detail or not progress.losses:
            print(printable(f"{name}: {end.reason}: {end.detail or 'before the first step; nothing was saved'}"))
    seconds = run.trainer.seconds
    tokens = sum(progress.tokens for progress in results.values())
    print(f"{tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s")
    if run.trainer.interrupted:
        print(printable("resume: " + shlex.join(["loradeck", "train", "--output", str(run.folder), "--resume"])))
        return 130
    if any(progress.end is not None and progress.end.reason == "diverged" for progress in results.values()):
        return 1
    print(printable("try: " + command_to_try(recipe, run.adapter_folder(next(iter(results))))))
    return 0


def command_to_try(recipe: RunRecipe, adapter: Path) -> str:
    """Return the command that uses an adapter of a run."""
    if recipe.task == "generate":
        return shlex.join(["loradeck", "generate", recipe.base, "Hello!", "--adapter", str(adapter)])
    data = recipe.jobs[0].valid or recipe.jobs[0].data
    return shlex.join(["loradeck", "eval", recipe.base, data, "--task", recipe.task, "--adapter", str(adapter)])


def outcome(progress: "Progress") -> str:
    """Return how a job that took a step ended, in words."""
    end, losses, best = progress.end, progress.losses, progress.best_loss
    assert end is not None
    validation = f", best validation loss {best:.4f} at step {end.kept}" if best else ""
    steps = f"{end.step} step{'s' * (end.step != 1)}"
    quality = "" if progress.accuracy is None else f", accuracy {progress.accuracy:.0%}"
    quality += "" if progress.margin is None else f", margin {progress.margin:.1f}"
    return f"{end.reason} after {steps}, loss {losses[0]:.3f} -> {losses[-1]:.3f}{quality}{validation}"


def say_finished(recipe: RunRecipe, folder: Path) -> bool:
    """If all jobs of a run have ended, say what they gave and how to train on; return whether it is so."""
    with quick_imports():
        from loradeck.train import checkpoint
        from loradeck.train.run import CHECKPOINTS

    state = checkpoint.finished(folder / CHECKPOINTS)
    if state is None:
        return False
    checkpoint.prune(folder / CHECKPOINTS, recipe.shared.keep_checkpoints)  # a kill may have come before that
    resume = shlex.join(["loradeck", "train", "--output", str(folder), "--resume"])
    for job in recipe.jobs:
        progress = state.jobs[job.name]
        what = f"{folder}: " if len(recipe.jobs) == 1 else f"{folder}: {job.name}: "
        what += outcome(progress) if progress.losses else "ended before the first step"
        if progress.end and progress.end.reason == "finished":
            steps = job.train.max_steps
            what += f"; to train on: {resume} " + (
                f"--max-steps {2 * steps}" if steps else f"--epochs {2 * job.train.epochs}"
            )
        print(printable(what))
    return True


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Check, before hours of training, that the adapter can be saved.

    Raises:
        AdapterError: the folder is a file, or contains an adapter.
        ConfigError: it is not writable.
        TrainingError: it contains a run.
    """
    from loradeck.lora.manifest import is_adapter

    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file", hint="Give a folder.")
    if not overwrite:
        if (folder / RUN_FILE).exists():
            raise TrainingError(
                f"{folder} contains a run", hint="Continue it with --resume, or replace it with --overwrite."
            )
        if folder.is_dir() and is_adapter(folder):
            raise AdapterError(f"{folder} contains an adapter", hint="Give another folder, or pass --overwrite.")
    check_writable(folder)


def read_run(folder: Path, *, sweep: bool) -> RunRecipe:
    """Read the recipe of a folder's run.

    Raises:
        TrainingError: there is no run, or it belongs to the other verb.
        ConfigError: as read_recipe.
    """
    if not (folder / RUN_FILE).exists():
        raise TrainingError(f"{folder} contains no run", hint="Start one: loradeck train BASE DATASET -o FOLDER")
    stored = read_recipe(folder / RUN_FILE)
    if stored.sweep != sweep:
        verb, kind = ("sweep", "a sweep") if stored.sweep else ("train", "not a sweep")
        command = shlex.join(["loradeck", verb, "--output", str(folder), "--resume"])
        raise TrainingError(f"the run in {folder} is {kind}", hint=f"Resume it: {command}")
    return stored


def check_same(recipe: RunRecipe, stored: RunRecipe) -> None:
    """Refuse to resume a run with other settings than the number of epochs or steps.

    A setting that was not given counts as the same.

    Raises:
        ConfigError: names each setting that differs, with both values.
    """
    problems = _differences(recipe, stored, ("base", "dtype", "weights", "task")) + _differences(
        recipe.shared, stored.shared
    )
    if [job.name for job in recipe.jobs] != [job.name for job in stored.jobs]:
        problems.append("the adapters' names differ")
    else:
        for job, old in zip(recipe.jobs, stored.jobs, strict=True):
            problems += _differences(job.reading, old.reading)
            problems += _differences(job.lora, old.lora) + _differences(job.train, old.train, RECIPE_NAMES)
            problems += _differences(job, old, ("last_layers",))
            problems += [
                f"{key} is {new!r}, the run has {before!r}"
                for key, new, before in (
                    ("dataset", job.data, old.data),
                    ("valid", job.valid, old.valid),
                    ("from", job.from_, old.from_),
                )
                if new is not None and (before is None or Path(new).resolve() != Path(before).resolve())
            ]
    if problems:
        raise ConfigError(
            "these are not the settings of the run in the folder",
            problems,
            hint="Resume with only --output and --resume.",
        )


def _differences(new: Any, old: Any, names: tuple[str, ...] = ()) -> list[str]:
    defaults = {field.name: field.default for field in fields(new)}
    return [
        f"{name} is {getattr(new, name)!r}, the run has {getattr(old, name)!r}"
        for name in names or defaults
        if getattr(new, name) != getattr(old, name) and (getattr(new, name) != defaults[name] or is_typed(name))
    ]


def extended(stored: RunRecipe, recipe: RunRecipe) -> RunRecipe:
    """Return a stored run with the epochs or steps that were given, if they are not its own.

    Raises:
        ConfigError: they are fewer.
    """
    jobs = [
        replace(job, train=_extended(job.train, new.train)) for job, new in zip(stored.jobs, recipe.jobs, strict=True)
    ]
    return replace(stored, jobs=tuple(jobs))


def _extended(old: TrainConfig, new: TrainConfig) -> TrainConfig:
    if new.max_steps is not None:
        name, config = "max_steps", replace(old, max_steps=new.max_steps)
    elif new.epochs != RECIPE.epochs or is_typed("epochs"):
        name, config = "epochs", replace(old, max_steps=None, epochs=new.epochs)
    else:
        return old
    if (getattr(old, name) or 0) > getattr(config, name):
        raise ConfigError(
            f"{name} is {getattr(config, name)}, the run has {getattr(old, name)} already", hint="Give more of them."
        )
    return config


def suffixes(config: LoraConfig) -> LoraConfig:
    """Return the config with comma-separated names of modules as a list; other targets are as in LoraConfig."""
    targets = config.target_modules
    if isinstance(targets, str) and targets != "attention" and re.fullmatch(r"[\w.]+(,[\w.]+)*", targets):
        return replace(config, target_modules=targets.split(","))
    return config
