"""A run that is killed at any moment resumes to the same bits; Ctrl-C ends it after a step; two runs are the same."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from loradeck.base.load import Base
from loradeck.errors import TrainingError
from loradeck.lora.adapter import Adapter
from loradeck.train import checkpoint
from loradeck.train.events import AnyEvent, End, Evaluation, Sample
from loradeck.train.history import read_history
from loradeck.train.recipe import RunRecipe, read_recipe
from loradeck.train.run import Run
from loradeck.train.schedule import Schedule

pytestmark = pytest.mark.slow

KILLS = 3
# Two jobs that differ, with everything a run keeps: dropout, validation, the best so far, samples, an early end.
RUN = """
base = "tiny"
checkpoint_every = 3
samples = 1
max_tokens = 100

[[adapter]]
name = "one"
data = "one.jsonl"
r = 4
lora_dropout = 0.2
learning_rate = 3e-3
batch_size = 3
max_steps = 24
valid = "contrary.jsonl"
eval_every = 3
loraplus_lr_ratio = 4

[[adapter]]
name = "two"
data = "two.jsonl"
target_modules = ["q_proj", "down_proj"]
lora_dropout = 0.1
learning_rate = 1e-3
batch_size = 2
max_steps = 13
seed = 5
"""

# For each line it reads, forks a process that runs a command, and prints its exit code and how often it asked the
# system for something in the run's folder. With `at`, the process sends itself a signal the at-th time. Torch is
# imported once.
COMMANDS = """
import json, os, signal, sys, torch
torch.set_num_threads(1)
from loradeck.cli import main, train
import loradeck.train.run, loradeck.generation, transformers.models.llama.modeling_llama
train.ANSWER_TOKENS = 8
for line in sys.stdin:
    folder, arguments, at, number = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.stdout = sys.stderr = open("log.txt", "a")
        name, count = arguments[arguments.index("-o") + 1], 0
        def watch(event, given):
            global count
            if event != "open" and not event.startswith(("os.", "shutil.")):
                return
            if any(name in os.fsdecode(each) for each in given if isinstance(each, (str, bytes, os.PathLike))):
                count += 1
                if count == at:
                    signal.raise_signal(number)
        sys.addaudithook(watch)
        code = main(arguments)
        sys.stdout.flush()
        os.write(write, str(count).encode())
        os._exit(code)
    os.close(write)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, os.read(read, 20).decode() or 0, flush=True)
    os.close(read)
"""


@dataclass
class Done:
    """How a command ended, and how often it asked the system for something in the run's folder."""

    code: int
    accesses: int


Command = Callable[..., Done]


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN)
    for name, words in {"one": "ahoy matey", "two": "yes indeed"}.items():
        lines = [{"prompt": f"{n} {name}?", "completion": f"{words} {n * n}" + "!" * (n % 5)} for n in range(17)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    # Training makes these less likely, so the best adapter is not the last, however a machine rounds.
    contrary = [{"prompt": f"{n} one?", "completion": f"{n * n} QUITE WRONG"} for n in range(5)]
    (tmp_path / "contrary.jsonl").write_text("\n".join(map(json.dumps, contrary)))
    return tmp_path


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", COMMANDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield process


@pytest.fixture
def command(folder: Path, server: subprocess.Popen[str]) -> Command:
    """Run a command in the folder, in a process of its own that may send itself a signal."""

    def run(*arguments: str, at: int | None = None, number: int = signal.SIGKILL) -> Done:
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps([str(folder), arguments, at, number]), file=server.stdin, flush=True)
        return Done(*map(int, server.stdout.readline().split()))

    return run


@dataclass
class Whole:
    """A run that was never interrupted: what it left, and its accesses to its folder."""

    outcome: dict[str, Any]
    accesses: int


@pytest.fixture(scope="module")
def cache() -> list[Whole]:
    return []


@pytest.fixture
def whole(folder: Path, command: Command, cache: list[Whole]) -> Whole:
    if not cache:
        done = command("train", "run.toml", "-o", "whole-run")
        assert done.code == 0
        cache.append(Whole(outcome(folder / "whole-run"), done.accesses))
    return cache[0]


def outcome(run: Path) -> dict[str, Any]:
    """Return everything that a run leaves, except times and memory."""
    left: dict[str, Any] = {name: (run / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")}
    for name in ("metrics.jsonl", "samples.jsonl"):
        events = [json.loads(line) for line in (run / name).read_text().splitlines()]
        left[name] = [{k: v for k, v in event.items() if k not in ("seconds", "took", "memory")} for event in events]
    return left


def test_killed_at_random_steps_it_resumes_to_the_same_bits(folder: Path, command: Command, whole: Whole) -> None:
    ends = {event["job"]: event for event in whole.outcome["metrics.jsonl"] if event["event"] == "end"}
    assert ends["one"]["kept"] < ends["one"]["step"] == 24, "the best is not the last, so resuming must know it"
    assert len(whole.outcome["samples.jsonl"]) == 8
    rng = random.Random(0)
    for number in range(KILLS):
        name = f"killed-run-{number}"
        first = rng.randrange(1, whole.accesses)
        assert command("train", "run.toml", "-o", name, at=first).code == -signal.SIGKILL
        if (folder / name / "run.toml").exists():
            second = rng.randrange(1, whole.accesses - first + 1)
            assert command("train", "-o", name, "--resume", at=second).code == -signal.SIGKILL
        resume = ["--resume"] if (folder / name / "run.toml").exists() else []
        assert command("train", "run.toml", "-o", name, *resume).code == 0
        assert outcome(folder / name) == whole.outcome
        assert len(checkpoint.checkpoints(folder / name / "checkpoints")) <= 2


def test_ctrl_c_ends_it_after_a_step_and_says_how_to_go_on(folder: Path, command: Command, whole: Whole) -> None:
    at = whole.accesses // 3
    assert command("train", "run.toml", "-o", "stopped-run", at=at, number=signal.SIGINT).code == 130
    log = (folder / "log.txt").read_text()
    assert "resume: loradeck train --output stopped-run --resume" in log
    (newest,) = checkpoint.checkpoints(folder / "stopped-run" / "checkpoints")[-1:]
    step = json.loads((newest / "state.json").read_text())["jobs"]["one"]["step"]
    events = [json.loads(line) for line in (folder / "stopped-run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in events if event["event"] == "end"] == ["interrupted"] * 2
    assert max(event["step"] for event in events if event["job"] == "one") == step
    assert (folder / "stopped-run" / "one" / "adapter_model.safetensors").exists(), "it can be used"
    assert command("train", "-o", "stopped-run", "--resume").code == 0
    assert outcome(folder / "stopped-run") == whole.outcome


@pytest.fixture
def stopped(folder: Path, base: Base) -> Path:
    """A run in this process that was interrupted after 10 passes."""
    run = Run(read_recipe(folder / "run.toml"), folder / "out", base)
    run.begin()
    run.train(lambda trainer: trainer.interrupt() if trainer.passes == 10 else None)
    run.bank.detach()
    return folder / "out"


def reopen(stopped: Path, base: Base) -> Run:
    return Run(read_recipe(stopped / "run.toml"), stopped, base)


def test_a_finished_run_has_nothing_to_do(stopped: Path, base: Base) -> None:
    run = reopen(stopped, base)
    assert run.resume() == 10
    run.train()
    before = outcome(stopped)
    run.bank.detach()
    run = reopen(stopped, base)
    run.resume()
    assert not run.trainer.running
    run.train()
    assert outcome(stopped) == before


def test_a_finished_run_is_extended_by_the_rule(folder: Path, base: Base) -> None:
    """As a run whose schedule becomes that of the new total at the step reached: bits of adapters and events."""
    recipe = read_recipe(folder / "run.toml")
    longer = {"one": 40, "two": 20}

    def extended(recipe: RunRecipe) -> RunRecipe:
        jobs = [replace(job, train=replace(job.train, max_steps=longer[job.name])) for job in recipe.jobs]
        return replace(recipe, jobs=tuple(jobs))

    run = Run(recipe, folder / "whole-run", base)
    run.begin()
    schedules = {
        name: Schedule.of(job.config, len(job.train), base.model.config) for name, job in run.trainer.jobs.items()
    }
    for name, job in run.trainer.jobs.items():  # both schedules in one run: the old total's, then the new one's
        old, new = schedules[name], replace(schedules[name], steps=longer[name], warmup=math.ceil(longer[name] / 10))
        job.schedule = Both(old, new)  # type: ignore[assignment]
    run.train()
    whole = adapters(folder / "whole-run")
    rates = {n: [step.learning_rate for step in h.steps] for n, h in read_history(folder / "whole-run").items()}
    run.bank.detach()

    run = Run(recipe, folder / "out", base)
    run.begin()
    run.train()
    assert {name: job.progress.step for name, job in run.trainer.jobs.items()} == {"one": 24, "two": 13}
    before = adapters(folder / "out")
    run.bank.detach()
    run = Run(extended(read_recipe(folder / "out" / "run.toml")), folder / "out", base)
    run.resume()
    run.train()
    assert {name: job.progress.step for name, job in run.trainer.jobs.items()} == longer
    history = read_history(folder / "out")
    assert {n: [step.learning_rate for step in h.steps] for n, h in history.items()} == rates
    assert adapters(folder / "out") == whole
    assert whole["two"] != before["two"]
    assert read_recipe(folder / "out" / "run.toml").jobs[0].train.max_steps == 40, "to resume it again"
    run.bank.detach()
    fewer = read_recipe(folder / "out" / "run.toml")
    fewer = replace(fewer, jobs=tuple(replace(job, train=replace(job.train, max_steps=5)) for job in fewer.jobs))
    with pytest.raises(TrainingError, match="one: it has taken 40 steps already, more than 5"):
        Run(fewer, folder / "out", base).resume()


class Both:
    """Two schedules, the second from the first one's end on."""

    def __init__(self, old: Schedule, new: Schedule) -> None:
        self.old, self.new = old, new
        self.steps, self.peak = new.steps, new.peak

    def __call__(self, step: int) -> float:
        return (self.old if step < self.old.steps else self.new)(step)


def adapters(run: Path) -> dict[str, dict[str, list[float]]]:
    return {name: tensors(run / name) for name in ("one", "two")}


def tensors(folder: Path) -> dict[str, list[float]]:
    return {key: tensor.flatten().tolist() for key, tensor in Adapter.load(folder).tensors()}


def test_without_a_checkpoint_it_begins_anew(stopped: Path, base: Base) -> None:
    for path in checkpoint.checkpoints(stopped / "checkpoints"):
        (path / "state.json").unlink()
    run = reopen(stopped, base)
    assert run.resume() == 0
    assert (stopped / "metrics.jsonl").read_bytes() == b""


def test_a_sample_is_of_the_weights_that_its_evaluation_measured(folder: Path, base: Base) -> None:
    """Also at the last step, after which the adapter becomes the best one, of an earlier step."""
    run = Run(read_recipe(folder / "run.toml"), folder / "out", base)
    measured: list[tuple[int, str]] = []
    sampled: list[tuple[int, str]] = []

    def weights() -> str:
        return str([float(tensor.double().sum()) for _, tensor in run.bank["one"].tensors()])

    def listen(event: AnyEvent) -> None:
        if isinstance(event, Evaluation):
            measured.append((event.step, weights()))
        if isinstance(event, Sample):
            sampled.append((event.step, event.answer))
        if isinstance(event, End) and event.job == "one":
            assert event.kept < event.step

    run.answer, run.on_event = (lambda names, prompts: [weights()] * len(prompts)), listen
    run.begin()
    run.train()
    assert sampled == measured
    assert len(measured) == 8


def test_changed_data_and_another_base_are_refused(stopped: Path, base: Base, folder: Path) -> None:
    with (folder / "two.jsonl").open("a") as file:
        file.write('\n{"prompt": "a", "completion": "b"}')
    run = reopen(stopped, base)
    with pytest.raises(TrainingError, match="two: its dataset has changed"):
        run.resume()
    run.bank.detach()
    other = Base(base.model, base.tokenizer, name="tiny", source="tiny", fingerprint="another")
    with pytest.raises(TrainingError, match="the base is a different one"):
        reopen(stopped, other).resume()


@pytest.mark.parametrize("file", ["state.json", "one.safetensors"])
def test_a_damaged_checkpoint_is_named(stopped: Path, base: Base, file: str) -> None:
    newest = checkpoint.checkpoints(stopped / "checkpoints")[-1]
    (newest / file).write_bytes((newest / file).read_bytes()[:40])
    with pytest.raises(TrainingError, match=f"{newest.name} cannot be resumed from"):
        reopen(stopped, base).resume()
