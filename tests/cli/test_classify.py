"""Classifiers from the command line: check, train, show, eval, and bases of every kind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from loradeck.lora.manifest import read_folder

pytestmark = pytest.mark.slow

FLAGS = ["--task", "classify", "--lr", 1e-2, "--max-steps", 24, "--batch-size", 4, "--r", 2, "--dtype", "float32"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Texts whose label is told by one letter; the validation texts are others."""
    for name, letters in {"train": "cdefghij", "valid": "klm"}.items():
        records = [
            {"text": f"{letter} {kind}", "label": label}
            for letter in letters for kind, label in (("b", "two"), ("a", "one"))
        ]  # fmt: skip
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path / "data"


def test_train_show_and_eval(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    ran = run("check", dataset, "--task", "classify")
    assert ran.code == 0, ran.err
    assert "train: 2 labels: one 8 (50.0%), two 8 (50.0%)" in ran.out
    ran = run("train", tiny_folder, dataset, "-o", "out/new", *FLAGS)
    assert ran.code == 0, ran.err
    assert "with 16 labels" in ran.out
    assert "accuracy 100%" in ran.out
    assert ran.out.endswith(f"try: loradeck eval {tiny_folder} {dataset} --task classify --adapter out/new\n")
    files = read_folder("out/new")
    assert files.origin.task_type == "SEQ_CLS"
    assert files.origin.labels == ("one", "two")
    assert files.origin.provenance["objective"] == "classification"
    assert set(files.saved) == {"score"}
    assert "2: one, two" in run("show", "out/new").out
    ran = run("eval", tiny_folder, dataset, "--task", "classify", "-a", "out/new", "--dtype", "float32")
    assert ran.code == 0, ran.err
    assert f"{dataset}, valid: 6 examples, 6 labels" in ran.out
    assert ran.out.split()[-6:] == ["one", "3", "1.000", "two", "3", "1.000"]
    report = json.loads(run("eval", tiny_folder, dataset, "--task", "classify", "-a", "out/new", "--json").out)
    (row,) = report["adapters"]
    assert (row["accuracy"], row["f1"]) == (1, 1)
    assert [label["count"] for label in row["labels"]] == [3, 3]
    ran = run("train", tiny_folder, dataset, "-o", "out/next", "--from", "out/new", *FLAGS[:2], "--max-steps", 1)
    assert ran.code == 0, ran.err
    assert read_folder("out/next").origin.labels == ("one", "two")
    (dataset / "valid.jsonl").write_text('{"text": "a", "label": "three"}')
    for arguments in (["eval", "-a", "out/new"], ["train", "-o", "out/x"]):
        ran = run(arguments[0], tiny_folder, dataset, *arguments[1:], "--task", "classify")
        assert ran.code == 2
        assert "valid.jsonl:1: $.label: 'three' is not one of the labels that training has: 'one', 'two'" in ran.err


def test_a_resumed_run_keeps_its_task(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    assert run("train", tiny_folder, dataset, "-o", "out/new", *FLAGS).code == 0
    ran = run("train", "-o", "out/new", "--resume", "--max-steps", 26)
    assert ran.code == 0, ran.err
    assert "26/26" in ran.out
    ran = run("train", "-o", "out/new", "--resume", "--task", "reward")
    assert ran.code == 2
    assert "task is 'reward', the run has 'classify'" in ran.err


@pytest.mark.parametrize("weights", ["plain", "packed", "int8", "int4"])
def test_on_weights_of_every_format(run: Callable, tiny_folder: Path, dataset: Path, weights: str) -> None:
    ran = run("train", tiny_folder, dataset, "-o", "out/new", *FLAGS, "--weights", weights)
    assert ran.code == 0, ran.err
    assert "best validation loss" in ran.out
    assert run("eval", tiny_folder, dataset, "--task", "classify", "-a", "out/new", "--weights", weights).code == 0


def test_on_a_gguf_file(run: Callable, bpe_folder: Path, dataset: Path, tiny: LlamaForCausalLM) -> None:
    assert run("export", bpe_folder, "-o", "tiny.gguf", "--quant", "q8_0").code == 0
    ran = run("train", "tiny.gguf", dataset, "-o", "out/new", *FLAGS)
    assert ran.code == 0, ran.err
    assert run("eval", "tiny.gguf", dataset, "--task", "classify", "-a", "out/new").code == 0
