"""Several processes that train together: what they compute, write and say is what one process does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from loradeck.dataset.example import Example
from loradeck.errors import ConfigError
from loradeck.lora.adapter import Adapter
from loradeck.train.batching import share
from loradeck.train.group import Group
from loradeck.train.sharding import shard_layers

from .scenarios import SCENARIOS, model

ROOT = Path(__file__).parents[2]
# Whose losses are float32. Of their weights, Adam may magnify the rounding of a small gradient to a whole step.
SINGLE = ("float32", "classifier")
LIMIT = 600  # seconds, for a machine that has other work


def start(arguments: Sequence[object], processes: int = 2) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GLOO", "TORCHELASTIC"))}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "-m",
        "--",
    ]
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**environment, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run(arguments: Sequence[object], processes: int = 2) -> str:
    process = start(arguments, processes)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of the scenarios."""
    folder = tmp_path_factory.mktemp("outcomes")
    run(["tests.train.scenarios", folder])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(outcomes: Path, name: str) -> None:
    one = SCENARIOS[name](Group())
    first, second = (torch.load(outcomes / f"{name} {rank}.pt") for rank in (0, 1))
    assert one.keys() == first.keys() == second.keys()
    for key, tensor in one.items():
        assert torch.equal(first[key], second[key]), key
        if name not in SINGLE:
            torch.testing.assert_close(first[key], tensor, rtol=1e-9, atol=1e-9)
        elif key.endswith(("losses", "validation")):
            torch.testing.assert_close(first[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_processes_that_differ_are_refused(outcomes: Path) -> None:
    for rank in (0, 1):
        text = (outcomes / f"refusal {rank}").read_text()
        assert "the processes do not train the same: process 1: the base is base 1, that of process 0 is base 0" in text
        assert "passes" not in text


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("lengths", [[], [5], [1, 1, 1, 1], [90, 1, 1, 1], [3, 50, 2, 40, 7, 7, 7, 7, 7]], ids=str)
def test_the_shares_are_all_units_once_and_about_as_long(lengths: list[int], size: int) -> None:
    units = [[Example([1] * length, [1] * length)] for length in lengths]
    parts = [share(units, rank, size) for rank in range(size)]
    assert (parts[0].start, parts[-1].stop) == (0, len(units))
    assert all(one.stop == other.start for one, other in pairwise(parts))
    for part in parts:
        assert sum(lengths[part]) <= sum(lengths) / size + max(lengths, default=0)


def test_a_process_alone_shards_nothing() -> None:
    with pytest.raises(ConfigError, match="this one is alone"):
        shard_layers(model(torch.float32), Group())


# ---- a run, by its command


def write_data(folder: Path) -> Path:
    data = folder / "data.jsonl"
    lines = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}" + ", aye" * (n % 5)} for n in range(40)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data


def command(base: Path, data: Path, output: Path, *more: object) -> list[object]:
    settings = "--r 4 --batch-size 4 --lora-dropout 0.1 --valid-ratio 0.2 --checkpoint-every 2 --samples 1".split()
    return ["loradeck", "train", base, data, "-o", output, "--dtype", "float32", *settings, *more]


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def single(arguments: Sequence[object]) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=environment, check=True, timeout=LIMIT)


@pytest.mark.slow
def test_a_run_of_two_writes_what_one_writes_and_another_number_resumes_it(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    single(command(tiny_folder, data, one, "--max-steps", 6))
    out = run(command(tiny_folder, data, two, "--max-steps", 4))
    assert out.count("finished after") == 2  # by the first process alone: the event, and the result
    run(["loradeck", "train", "-o", two, "--resume", "--max-steps", 5], processes=3)
    single(["loradeck", "train", "-o", two, "--resume", "--max-steps", 6])
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert (two / "samples.jsonl").read_text().count("\n") >= (one / "samples.jsonl").read_text().count("\n")
    assert Adapter.load(two).config == Adapter.load(one).config


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    single(command(tiny_folder, data, whole, "--max-steps", 60))
    process = start(command(tiny_folder, data, killed, "--max-steps", 60))
    checkpoints = killed / "checkpoints"
    deadline = time.monotonic() + LIMIT
    while not [*checkpoints.glob("*/state.json")]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert "SIGKILL" in err
    assert not re.search(r"finished after", (killed / "metrics.jsonl").read_text())
    run(["loradeck", "train", "-o", killed, "--resume"])
    torch.testing.assert_close(losses(killed), losses(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_an_error_is_told_and_nothing_hangs(tiny_folder: Path, tmp_path: Path) -> None:
    process = start(command(tiny_folder, tmp_path / "missing.jsonl", tmp_path / "run"))
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert re.search(r"^loradeck: (?!process).*missing.jsonl", err, re.MULTILINE)
    assert not (tmp_path / "run").exists()
