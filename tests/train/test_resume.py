"""A run that is killed at any moment goes on to the same bits; Ctrl-C ends it after a step; two runs are the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loradeck.base.load import Base
from loradeck.errors import TrainingError
from loradeck.train import checkpoint
from loradeck.train.events import AnyEvent, End, Evaluation, Sample
from loradeck.train.recipe import read_recipe
from loradeck.train.run import Run

KILLS = 3
# Two jobs that differ, with all that a run keeps: dropout, validation, the best so far, samples, an early end.
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
max_steps = 40
valid = "contrary.jsonl"
eval_every = 4
loraplus_lr_ratio = 4

[[adapter]]
name = "two"
data = "two.jsonl"
target_modules = ["q_proj", "down_proj"]
lora_dropout = 0.1
learning_rate = 1e-3
batch_size = 2
max_steps = 23
seed = 5
"""

# For each line it reads, forks a process that runs the command, and says how it ended: so torch is imported once.
COMMANDS = """
import json, os, sys, torch
torch.set_num_threads(1)
from loradeck.cli import main
import loradeck.train.run, loradeck.generation, transformers.models.llama.modeling_llama
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open("log.txt", "a")
        code = main(json.loads(line))
        sys.stdout.flush()
        os._exit(code)
    print(f"child {child}", flush=True)
    _, status = os.waitpid(child, 0)
    print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)
"""

Command = Callable[..., int]


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN)
    for name, words in {"one": "ahoy matey", "two": "yes indeed"}.items():
        lines = [{"prompt": f"{n} {name}?", "completion": f"{words} {n * n}" + "!" * (n % 5)} for n in range(17)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    # What is learned makes these less likely: so the best is not the last, however a machine rounds.
    contrary = [{"prompt": f"{n} one?", "completion": f"{n * n} QUITE WRONG"} for n in range(5)]
    (tmp_path / "contrary.jsonl").write_text("\n".join(map(json.dumps, contrary)))
    return tmp_path


@pytest.fixture
def command(folder: Path) -> Iterator[Command]:
    """Run a command in a process of its own; send it a signal once a run's metrics have so many lines."""

    def run(*arguments: str, at: int | None = None, send: int = signal.SIGKILL) -> int:
        metrics = folder / arguments[arguments.index("-o") + 1] / "metrics.jsonl"
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(arguments), file=server.stdin, flush=True)
        child = int(server.stdout.readline().split()[1])
        if at is not None:
            before = metrics.stat().st_mtime_ns if metrics.exists() else 0
            while not (metrics.exists() and metrics.stat().st_mtime_ns > before and lines(metrics) >= at):
                time.sleep(0.001)
            os.kill(child, send)
        return int(server.stdout.readline().split()[1])

    with subprocess.Popen(
        [sys.executable, "-c", COMMANDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as server:
        yield run


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves, without what the clock and the memory say."""
    found: dict[str, Any] = {name: (run / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")}
    for name in ("metrics.jsonl", "samples.jsonl"):
        events = [json.loads(line) for line in (run / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in event.items() if k not in ("seconds", "took", "memory")} for event in events]
    return found


def test_killed_at_random_steps_it_resumes_to_the_same_bits(folder: Path, command: Command) -> None:
    assert command("train", "run.toml", "-o", "whole") == 0
    expected = outcome(folder / "whole")
    ends = {event["job"]: event for event in expected["metrics.jsonl"] if event["event"] == "end"}
    assert ends["one"]["kept"] < ends["one"]["step"] == 40, "the best is not the last, so resuming must know it"
    assert len(expected["samples.jsonl"]) == 10
    total = lines(folder / "whole" / "metrics.jsonl")
    chance = random.Random(0)
    for number in range(KILLS):
        name = f"killed{number}"
        at = sorted(chance.sample(range(1, total), 2))
        assert command("train", "run.toml", "-o", name, at=at[0]) == -signal.SIGKILL
        code = command("train", "-o", name, "--resume", at=at[1])
        assert code in (0, -signal.SIGKILL)
        if code:
            assert command("train", "run.toml", "-o", name, "--resume") == 0
        assert outcome(folder / name) == expected
        assert len(checkpoint.checkpoints(folder / name / "checkpoints")) <= 2


def test_ctrl_c_ends_it_after_a_step_and_says_how_to_go_on(folder: Path, command: Command) -> None:
    assert command("train", "run.toml", "-o", "whole") == 0
    assert command("train", "run.toml", "-o", "stopped", at=9, send=signal.SIGINT) == 130
    log = (folder / "log.txt").read_text()
    assert "resume: loradeck train --output stopped --resume" in log
    (newest,) = checkpoint.checkpoints(folder / "stopped" / "checkpoints")[-1:]
    done = json.loads((newest / "state.json").read_text())["jobs"]["one"]["step"]
    stopped = [json.loads(line) for line in (folder / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in stopped if event["event"] == "end"] == ["interrupted"] * 2
    assert max(event["step"] for event in stopped if event["job"] == "one") == done
    assert (folder / "stopped" / "one" / "adapter_model.safetensors").exists(), "what there is can be used"
    assert command("train", "-o", "stopped", "--resume") == 0
    assert outcome(folder / "stopped") == outcome(folder / "whole")


@pytest.fixture
def stopped(folder: Path, base: Base) -> Path:
    """A run in this process that was interrupted after 10 passes."""
    run = Run(read_recipe(folder / "run.toml"), folder / "out", base)
    run.begin()
    run.train(lambda trainer: trainer.interrupt() if trainer.passes == 10 else None)
    run.bank.detach()
    return folder / "out"


def again(stopped: Path, base: Base) -> Run:
    return Run(read_recipe(stopped / "run.toml"), stopped, base)


def test_a_finished_run_has_nothing_to_do(stopped: Path, base: Base) -> None:
    run = again(stopped, base)
    assert run.resume() == 10
    run.train()
    before = outcome(stopped)
    run.bank.detach()
    run = again(stopped, base)
    run.resume()
    assert not run.trainer.running
    run.train()
    assert outcome(stopped) == before


def test_without_a_checkpoint_it_begins(stopped: Path, base: Base) -> None:
    for path in checkpoint.checkpoints(stopped / "checkpoints"):
        (path / "state.json").unlink()
    run = again(stopped, base)
    assert run.resume() == 0
    assert (stopped / "metrics.jsonl").read_bytes() == b""


def test_a_sample_is_of_the_weights_that_its_evaluation_measured(folder: Path, base: Base) -> None:
    """Also at the last step, where the adapter becomes the best one, which is an earlier one."""
    run = Run(read_recipe(folder / "run.toml"), folder / "out", base)
    measured: list[tuple[int, str]] = []
    sampled: list[tuple[int, str]] = []

    def weights() -> str:
        return str([float(tensor.double().sum()) for _, tensor in run.bank["one"].tensors()])

    def hear(event: AnyEvent) -> None:
        if isinstance(event, Evaluation):
            measured.append((event.step, weights()))
        if isinstance(event, Sample):
            sampled.append((event.step, event.answer))
        if isinstance(event, End) and event.job == "one":
            assert event.kept < event.step

    run.answer, run.on_event = (lambda names, prompts: [weights()] * len(prompts)), hear
    run.begin()
    run.train()
    assert sampled == measured
    assert len(measured) == 10


def test_changed_data_and_another_base_are_refused(stopped: Path, base: Base, folder: Path) -> None:
    with (folder / "two.jsonl").open("a") as file:
        file.write('\n{"prompt": "a", "completion": "b"}')
    run = again(stopped, base)
    with pytest.raises(TrainingError, match="two: its dataset has changed"):
        run.resume()
    run.bank.detach()
    other = Base(base.model, base.tokenizer, name="tiny", source="tiny", fingerprint="another")
    with pytest.raises(TrainingError, match="the base is another one"):
        again(stopped, other).resume()


@pytest.mark.parametrize("file", ["state.json", "one.safetensors"])
def test_a_damaged_checkpoint_is_named(stopped: Path, base: Base, file: str) -> None:
    newest = checkpoint.checkpoints(stopped / "checkpoints")[-1]
    (newest / file).write_bytes((newest / file).read_bytes()[:40])
    with pytest.raises(TrainingError, match=f"{newest.name} cannot be resumed from"):
        again(stopped, base).resume()
