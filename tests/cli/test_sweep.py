import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.lora.manifest import read_folder
from loradeck.train.history import read_history

pytestmark = pytest.mark.slow


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    lines = [{"prompt": f"{n}?", "completion": f"It is {n % 3}"} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_successive_halving_stops_the_worse_half(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    flags = ["--lr", "1e-6,1e-2,1e-5", "--r", "2,4", "--max-steps", 16, "--batch-size", 4, "--samples", 0]
    ran = run("sweep", tiny_folder, dataset, "-o", "best", *flags)
    assert ran.code == 0, ran.err
    history = read_history(Path("best"))
    assert history.keys() == {f"lr{lr}-r{r}" for lr in ("1e-06", "0.01", "1e-05") for r in (2, 4)}
    ends = {name: track.end for name, track in history.items() if track.end}
    assert sorted(end.step for end in ends.values()) == [3, 3, 3, 5, 9, 16]
    assert sorted(end.reason for end in ends.values()) == ["finished"] + ["stopped"] * 5
    (winner,) = [name for name, end in ends.items() if end.reason == "finished"]
    assert winner.startswith("lr0.01")
    assert read_folder("best").config.r == int(winner[-1])
    tensors = [Path("best", *more, "adapter_model.safetensors").read_bytes() for more in ((), (winner,))]
    assert tensors[0] == tensors[1]
    for name, end in ends.items():
        assert name in ran.out
        if end.reason == "stopped":
            assert "the better half, up to" in end.detail
    assert f"best: the adapter of {winner}" in ran.out
    assert run("generate", tiny_folder, "3?", "--adapter", "best", "--max-new-tokens", 2).code == 0


def test_a_dry_run_prints_the_plan_once(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    flags = ["--lr", "1e-3,1e-2,2e-2", "--r", "2,4", "--dry-run"]
    ran = run("sweep", tiny_folder, dataset, "-o", "best", *flags)
    assert ran.code == 0, ran.err
    for once in ("of the base's", "The first example:", "warm-up", "6 trials, each as above except for:"):
        assert ran.out.count(once) == 1
    rows = [line.split() for line in ran.out.splitlines()]
    sizes = {row[0]: row[1:] for row in rows if row and row[0].startswith("lr")}
    assert {name: cells[:2] for name, cells in sizes.items()} == {
        f"lr{rate}-r{r}": [rate, str(r)] for rate in ("0.001", "0.01", "0.02") for r in (2, 4)
    }
    assert sizes["lr0.02-r2"][2] != sizes["lr0.02-r4"][2], "the number of parameters"


def test_losses_at_a_halving_are_fresh(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    """Whatever the steps between evaluations, each halving has one of its own."""
    flags = ["--lr", "1e-3,1e-2", "--max-steps", 8, "--eval-every", 3, "--samples", 0]
    assert run("sweep", tiny_folder, dataset, "-o", "best", *flags).code == 0
    for track in read_history(Path("best")).values():
        assert 4 in [event.step for event in track.evaluations]


def test_a_sweep_is_resumed_as_one(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    flags = ["--lr", "1e-3,1e-2,1e-4", "--max-steps", 8, "--batch-size", 4, "--samples", 0, "--checkpoint-every", 3]
    assert run("sweep", tiny_folder, dataset, "-o", "whole/best", *flags).code == 0
    assert run("sweep", tiny_folder, dataset, "-o", "best", *flags).code == 0
    for checkpoint in sorted(Path("best/checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)  # as a kill would have left it
    ran = run("train", "-o", "best", "--resume")
    assert ran.code == 2
    assert "loradeck sweep --output best --resume" in ran.err
    ran = run("sweep", "-o", "best", "--lr", "1e-3,1e-2", "--resume")
    assert ran.code == 2
    assert "--resume takes no other settings" in ran.err
    assert run("sweep", "-o", "best", "--resume").code == 0
    ran = run("sweep", "-o", "best", "--resume")
    assert ran.code == 0
    assert ran.out.startswith("best: finished, the adapter of lr")
    assert ran.out.count("\n") == 1, "no plan, no base"
    for name in ("", "lr0.001", "lr0.01", "lr0.0001"):
        tensors = [Path(root, name, "adapter_model.safetensors").read_bytes() for root in ("best", "whole/best")]
        assert tensors[0] == tensors[1]


def test_what_is_no_sweep_is_not_resumed_as_one(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    assert run("train", tiny_folder, dataset, "-o", "out", "--max-steps", 1).code == 0
    ran = run("sweep", "-o", "out", "--resume")
    assert ran.code == 2
    assert "loradeck train --output out --resume" in ran.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "at least two different trials"),
        (["--lr", "1e-3"], "at least two different trials"),
        (["--r", "4,4"], "at least two different trials"),
        (["--r", "4,x"], "--r 4,x: "),
        (["--r", "0,4"], "r is 0"),
        (["--lr", "1e-3,-1"], "learning_rate must be a number above 0, not -1.0"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    run: Callable, tiny_folder: Path, dataset: Path, flags: list[str], message: str
) -> None:
    ran = run("sweep", tiny_folder, dataset, "-o", "best", *flags)
    assert ran.code == 2
    assert message in ran.err
    assert not Path("best").exists()
