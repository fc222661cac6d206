import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from loradeck.base import load
from loradeck.base.load import Base
from loradeck.cli.train import suffixes
from loradeck.gguf.model import Merge, Model, export
from loradeck.lora.adapter import Adapter
from loradeck.lora.config import LoraConfig
from loradeck.lora.manifest import read_folder
from loradeck.stored import digest_of, files_of
from loradeck.train.history import read_history

pytestmark = pytest.mark.slow

LINES = [{"prompt": "Hi", "completion": "Ahoy!"}, {"prompt": "2+2?", "completion": "Four, matey"}]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES))
    return path


def test_it_trains_and_saves_and_says_what_to_try(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    flags = ["--r", 2, "--target-modules", "q_proj,v_proj", "--epochs", 2, "--batch-size", 1, "--seed", 3]
    ran = run("train", tiny_folder, dataset, "-o", "out/new", *flags)
    assert ran.code == 0, ran.err
    assert "step 4/4" in ran.out
    assert "out/new: " in ran.out
    assert ran.out.endswith(f"try: loradeck generate {tiny_folder} 'Hello!' --adapter out/new\n")
    listing = read_folder("out/new")
    assert (listing.config.r, set(listing.config.target_modules)) == (2, {"q_proj", "v_proj"})
    record = listing.origin.provenance
    assert record.keys() >= {"base_fingerprint", "chat_template_sha256", "data_sha256"}
    assert (record["dataset"], record["objective"], record["steps"]) == ("lines.jsonl", "sft", "4")
    last = read_history(Path("out/new"))["new"].steps[-1]
    assert (record["tokens"], record["loss"]) == (f"{last.tokens}", f"{last.loss:.4f}")
    tensors = Path("out/new/adapter_model.safetensors").read_bytes()
    assert run("train", tiny_folder, dataset, "-o", "out/again", *flags).code == 0
    assert Path("out/again/adapter_model.safetensors").read_bytes() == tensors
    assert run("generate", tiny_folder, "Hello!", "--adapter", "out/new", "--max-new-tokens", 2).code == 0


def test_an_adapter_is_replaced_only_if_asked(run: Callable, tiny_folder: Path, dataset: Path, adapters: Path) -> None:
    before = (adapters / "poet" / "adapter_model.safetensors").read_bytes()
    ran = run("train", tiny_folder, dataset, "-o", adapters / "poet", "--max-steps", 1)
    assert ran.code == 2
    assert "--overwrite" in ran.err
    assert (adapters / "poet" / "adapter_model.safetensors").read_bytes() == before
    (adapters / "poet" / "notes.txt").write_text("mine")
    ran = run("train", tiny_folder, dataset, "-o", adapters / "poet", "--max-steps", 1, "--overwrite")
    assert ran.code == 0
    assert "finished after 1 step, loss" in ran.out
    assert (adapters / "poet" / "adapter_model.safetensors").read_bytes() != before
    assert (adapters / "poet" / "notes.txt").read_text() == "mine"


def test_a_dry_run_prints_the_plan_and_writes_nothing(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    before = sorted(Path().iterdir())
    ran = run("train", tiny_folder, dataset, "-o", "out/new", "--dry-run")
    assert ran.code == 0
    assert "learning rate" in ran.out
    assert sorted(Path().iterdir()) == before


def test_a_dataset_with_other_columns_trains(run: Callable, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    rows = [{"Question": each["prompt"], "Answer": each["completion"], "id": 7} for each in LINES]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"Question": "x" * 90, "Answer": "y"}]))
    ran = run("train", tiny_folder, path, "-o", "out/new", "--max-steps", 1, "--max-length", 64)
    assert ran.code == 2
    assert "(in 3 records: also qa.jsonl:2, qa.jsonl:3)" in ran.err
    columns = "prompt=Question,completion=Answer"
    assert f"Name the columns: --columns {columns}" in ran.err
    flags = ["--columns", columns, "--skip-long", "--max-steps", 1, "--max-length", 64]
    ran = run("train", tiny_folder, path, "-o", "out/new", *flags)
    assert ran.code == 0, ran.err
    assert "passed over: id (in 2)" in ran.out
    assert "qa.jsonl:3: left out: longer than 64 tokens" in ran.out
    ran = run("train", tiny_folder, path, "-o", "out/new", *flags[:2], "--resume")
    assert ran.code == 0
    ran = run("train", tiny_folder, path, "-o", "out/new", "--columns", "prompt=Answer,completion=Question", "--resume")
    assert "columns is {'prompt': 'Answer', 'completion': 'Question'}, the run has" in ran.err
    tensors = Path("out/new/adapter_model.safetensors").read_bytes()
    Path("run.toml").write_text(
        f'base = "{tiny_folder}"\n[[adapter]]\nname = "file"\ndata = "qa.jsonl"\nmax_steps = 1\nmax_length = 64\n'
        "skip_long = true\n[adapter.columns]\nprompt = 'Question'\ncompletion = 'Answer'\n"
    )
    assert run("train", "run.toml", "-o", "out/file").code == 0
    assert Path("out/file/adapter_model.safetensors").read_bytes() == tensors


def test_ctrl_c_saves_what_there_is_and_resume_goes_on(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    flags = ["--r", 2, "--epochs", 3, "--batch-size", 1]
    assert run("train", tiny_folder, dataset, "-o", "whole", *flags).code == 0
    ran = interrupted(run, "train", tiny_folder, dataset, "-o", "out", *flags)
    assert ran.code == 130
    assert "resume: loradeck train --output out --resume" in ran.out
    assert Path("out/adapter_config.json").exists()
    assert run("train", "-o", "out", "--resume").code == 0
    files = [Path(name) / "adapter_model.safetensors" for name in ("out", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_it_trains_on_the_blocks_of_a_file(
    run: Callable, bpe_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(Model.open(str(bpe_folder)), Merge(), Path("tiny.gguf"), "q4_1")
    flags = ["--r", 2, "--epochs", 3, "--batch-size", 1]
    assert run("train", "tiny.gguf", dataset, "-o", "plain", *flags, "--dtype", "float32").code == 0
    monkeypatch.setattr(load, "dequantised_folder", None)
    assert run("train", "tiny.gguf", dataset, "-o", "whole", *flags).code == 0
    assert interrupted(run, "train", "tiny.gguf", dataset, "-o", "out", *flags).code == 130
    assert run("train", "-o", "out", "--resume").code == 0
    files = [Path(name) / "adapter_model.safetensors" for name in ("out", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    records = [read_folder(name).origin.provenance for name in ("whole", "plain")]
    assert records[0]["base_quantisation"].startswith("Q4_1")
    assert "base_quantisation" not in records[1]
    assert records[0]["base_fingerprint"] == records[1]["base_fingerprint"]
    assert run("generate", "tiny.gguf", "Hello!", "--adapter", "out", "--max-new-tokens", 2).code == 0


def test_it_trains_on_weights_that_it_quantises(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    flags = ["--r", 2, "--max-steps", 2, "--weights", "int4"]
    assert run("train", tiny_folder, dataset, "-o", "out", *flags).code == 0
    assert read_folder("out").origin.provenance["base_quantisation"] == "Q4_1"
    assert 'weights = "int4"' in Path("out/run.toml").read_text()
    assert run("train", "-o", "out", "--resume", "--max-steps", 3).code == 0
    ran = run("train", "-o", "out", "--resume", "--max-steps", 4, "--weights", "int8")
    assert ran.code == 2
    assert "weights is 'int8', the run has 'int4'" in ran.err
    assert run("sweep", tiny_folder, dataset, "-o", "best", "--lr", "1e-3,3e-3", *flags).code == 0
    assert read_folder("best").origin.provenance["base_quantisation"] == "Q4_1"
    Path("run.toml").write_text(
        f'base = "{tiny_folder}"\nweights = "int3"\n[[adapter]]\nname = "a"\ndata = "{dataset}"\n'
    )
    assert "invalid weights 'int3'" in run("train", "run.toml", "-o", "none").err


def test_a_run_is_resumed_only_as_itself(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    flags = ["--r", 2, "--max-steps", 2]
    assert run("train", tiny_folder, dataset, "-o", "out", *flags).code == 0
    ran = run("train", tiny_folder, dataset, "-o", "out", "--r", 3, "--max-steps", 2, "--seed", 4, "--resume")
    assert ran.code == 2
    assert "r is 3, the run has 2" in ran.err
    assert "seed is 4, the run has 0" in ran.err
    assert run("train", tiny_folder, dataset, "-o", "out", "--max-steps", 2, "--resume").code == 0
    ran = run("train", tiny_folder, dataset, "-o", "out", *flags)
    assert ran.code == 2
    assert "out contains a run" in ran.err
    assert run("train", tiny_folder, dataset, "-o", "out", *flags, "--overwrite").code == 0
    ran = run("train", "-o", "nowhere", "--resume")
    assert ran.code == 2
    assert "nowhere contains no run" in ran.err


def test_a_finished_run_says_so_and_is_extended(
    run: Callable, tiny_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--r", 2, "--batch-size", 1, "--valid", "lines.jsonl"]
    assert run("train", tiny_folder, dataset, "-o", "out", *flags, "--epochs", 2).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Base, "load", lambda *_, **__: pytest.fail("the base was loaded"))
        for arguments in ([], [tiny_folder, dataset, *flags], ["--epochs", 2]):
            ran = run("train", *arguments, "-o", "out", "--resume")
            assert ran.code == 0, ran.err
            (line,) = ran.out.splitlines()
            assert line.startswith("out: finished after 4 steps, loss ")
            assert "best validation loss" in line
            assert line.endswith("to train on: loradeck train --output out --resume --epochs 4")
        ran = run("train", "-o", "out", "--resume", "--epochs", 1)
        assert ran.code == 2
        assert "epochs is 1, the run has 2 already" in ran.err
        for flag, value in (("--r", 16), ("--seed", 4), ("--batch-size", 8), ("--from", "out")):
            ran = run("train", "-o", "out", "--resume", flag, value, "--epochs", 3)
            assert ran.code == 2, f"{flag} {value} is given, though it may be the default"
            assert f"{flag[2:].replace('-', '_')} is" in ran.err
    ran = run("train", "-o", "out", "--resume", "--epochs", 3)  # the default, but given
    assert ran.code == 0, ran.err
    assert "resumed out after 4 passes" in ran.out
    assert "out: next is step 5 of 6, at a learning rate of " in ran.out
    assert "finished after 6 steps" in ran.out
    assert len(read_history(Path("out"))["out"].steps) == 6
    ran = run("train", tiny_folder, dataset, "-o", "out", *flags, "--max-steps", 9, "--resume")
    assert ran.code == 0, ran.err
    assert "finished after 9 steps" in ran.out
    ran = run("train", "-o", "out", "--resume")
    assert ran.out.startswith("out: finished after 9 steps")
    assert ran.out.endswith("--max-steps 18\n")


def test_a_run_file_extends_its_run(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    text = f'base = "{tiny_folder}"\n' + "".join(
        f'[[adapter]]\nname = "{name}"\ndata = "lines.jsonl"\nmax_steps = 2\n' for name in "ab"
    )
    Path("run.toml").write_text(text)
    assert run("train", "run.toml", "-o", "out").code == 0
    ran = run("train", "run.toml", "-o", "out", "--resume")
    assert [line.partition(" after ")[0] for line in ran.out.splitlines()] == ["out: a: finished", "out: b: finished"]
    Path("run.toml").write_text(text.replace("max_steps = 2", "max_steps = 3", 1))
    ran = run("train", "run.toml", "-o", "out", "--resume")
    assert ran.code == 0, ran.err
    assert {name: len(each.steps) for name, each in read_history(Path("out")).items()} == {"a": 3, "b": 2}


def test_a_run_is_resumed_and_repeated_from_anywhere(
    run: Callable, tiny_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = os.path.relpath(tiny_folder)
    flags = ["--r", 2, "--max-steps", 2, "--valid", "lines.jsonl"]
    assert run("train", base, "lines.jsonl", "-o", "out", *flags).code == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run("train", "-o", "../out", "--resume").code == 0
    assert run("train", "-o", "../out", "--resume", "--max-steps", 3, "--valid", "../lines.jsonl").code == 0
    ran = run("train", "../out/run.toml", "-o", "../out2/out")
    assert ran.code == 0, ran.err


def test_a_run_file_trains_all_its_adapters(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    pairs = [
        {"prompt": "Hi", "chosen": "Ahoy!", "rejected": "Hello."},
        {"prompt": "Bye", "chosen": "Aye", "rejected": "x"},
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    Path("run.toml").write_text(
        f'base = "{tiny_folder}"\n[defaults]\nmax_steps = 3\n'
        '[[adapter]]\nname = "sft"\ndata = "lines.jsonl"\nr = 2\nvalid = "lines.jsonl"\neval_every = 2\n'
        '[[adapter]]\nname = "dpo"\ndata = "pairs.jsonl"\nlast_layers = 1\n'
    )
    ran = run("train", "run.toml", "-o", "out")
    assert ran.code == 0, ran.err
    assert "preference pairs" in ran.out
    assert "best validation loss" in ran.out
    assert all("layers.1." in path for path in read_folder("out/dpo").sites)
    record = read_folder("out/dpo").origin.provenance
    assert record["objective"] == "dpo"
    assert record.keys() >= {"accuracy", "margin", "loss"}
    assert "validation_loss" in read_folder("out/sft").origin.provenance
    assert read_folder("out/sft").config.r == 2
    card = Path("out/sft/README.md").read_text()
    assert "lines.jsonl" in card
    assert str(Path.cwd()) not in card, "a card is for others to read"
    samples = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert {sample["expected"] for sample in samples} == {"Ahoy!", "Four, matey"}


@pytest.mark.parametrize(
    "flags", [["--r", 3], ["--epochs", 1], ["--dtype", "float32"], ["--valid", "lines.jsonl"], ["--last-layers", 1]]
)
def test_a_setting_beside_a_run_file_is_refused(
    run: Callable, tiny_folder: Path, dataset: Path, flags: list[object]
) -> None:
    Path("run.toml").write_text(f'base = "{tiny_folder}"\n[[adapter]]\nname = "a"\ndata = "lines.jsonl"\n')
    ran = run("train", "run.toml", "-o", "out", *flags)
    assert ran.code == 2
    assert "a run file takes no other settings" in ran.err


def write_pairs(path: Path) -> None:
    pairs = [{"prompt": f"Hi {n}", "chosen": f"Ahoy {n}!", "rejected": f"Hello {n}."} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, pairs)))


@pytest.mark.parametrize("door", ["flag", "run file"])
def test_it_goes_on_from_an_adapter(run: Callable, tiny_folder: Path, dataset: Path, door: str) -> None:
    """A step too small to change anything leaves the parent as it was; its settings and lineage are recorded."""
    flags = ["--r", 2, "--target-modules", "q_proj,v_proj", "--max-steps", 3, "--lora-dropout", 0.1]
    assert run("train", tiny_folder, dataset, "-o", "parent", *flags).code == 0
    if door == "flag":
        ran = run("train", tiny_folder, dataset, "-o", "child", "--from", "parent", "--max-steps", 1, "--lr", 1e-30)
    else:
        Path("run.toml").write_text(
            f'base = "{tiny_folder}"\n[[adapter]]\nname = "child"\ndata = "lines.jsonl"\nfrom = "parent"\n'
            "max_steps = 1\nlearning_rate = 1e-30\n"
        )
        ran = run("train", "run.toml", "-o", "child")
    assert ran.code == 0, ran.err
    parent, child = Adapter.load("parent"), Adapter.load("child")
    assert child.config == parent.config
    for (key, one), (_, other) in zip(parent.tensors(), child.tensors(), strict=True):
        assert torch.equal(one, other), key
    record = child.origin.provenance
    listing = read_folder("parent")
    assert record["parent"] == "parent"
    assert record["parent_sha256"] == digest_of(listing.folder, files_of(listing))
    assert record["steps"] == "1"
    assert "goes on from" in Path("child/README.md").read_text()
    assert 'from = "' in Path("child/run.toml").read_text()
    assert run("train", "child/run.toml", "-o", "again/child").code == 0
    assert (
        Path("again/child/adapter_model.safetensors").read_bytes()
        == Path("child/adapter_model.safetensors").read_bytes()
    )


def test_dpo_from_an_adapter_compares_with_that_adapter(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    write_pairs(Path("pairs.jsonl"))
    assert run("train", tiny_folder, dataset, "-o", "sft", "--lr", 3e-2, "--epochs", 9).code == 0
    flags = [
        "--dtype",
        "float32",
        "--dpo-sft-weight",
        0,
        "--batch-size",
        4,
        "--max-steps",
        4,
        "--checkpoint-every",
        2,
        "--valid",
        "pairs.jsonl",
    ]
    assert run("train", tiny_folder, "pairs.jsonl", "-o", "dpo", "--from", "sft", *flags).code == 0
    first, second, *_ = read_history(Path("dpo"))["dpo"].steps
    assert first.loss == pytest.approx(math.log(2), abs=1e-6)
    assert first.margin == pytest.approx(0, abs=1e-5)
    assert second.margin != pytest.approx(0, abs=1e-5)
    before = Path("dpo/adapter_model.safetensors").read_bytes()
    shutil.rmtree(max(Path("dpo/checkpoints").iterdir()))
    assert run("train", "-o", "dpo", "--resume").code == 0
    assert Path("dpo/adapter_model.safetensors").read_bytes() == before, "resumed, its reference is the same"
    shutil.rmtree(max(Path("dpo/checkpoints").iterdir()))
    assert run("train", tiny_folder, dataset, "-o", "sft", "--max-steps", 1, "--overwrite").code == 0
    ran = run("train", "-o", "dpo", "--resume")
    assert ran.code == 2
    assert "the adapter that it goes on from has changed" in ran.err


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a base fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(Base, "load", load)


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["lines.jsonl", "--valid", "nowhere.jsonl"], ["nowhere.jsonl cannot be read"]),
        (["nowhere.jsonl"], ["nowhere.jsonl cannot be read"]),
        (["nowhere/"], ["nowhere"]),
        (["lines.jsonl", "--from", "nowhere"], ["nowhere is not a folder"]),
        (["lines.jsonl", "--from", "adapters/cut"], ["cut"]),
        (["lines.jsonl", "--from", "adapters/poet", "--r", "8"], ["r is 8, the adapter has 4"]),
        (
            ["lines.jsonl", "--from", "adapters/pirate", "--r", "3", "--target-modules", "k_proj"],
            ["r is 3, the adapter has 8", "target_modules is k_proj, the adapter has embed_tokens,q_proj"],
        ),
        (["lines.jsonl", "--from", "adapters/poet", "--last-layers", "1"], ["last_layers is 1"]),
        (["lines.jsonl", "-o", "adapters/poet", "--from", "adapters/poet", "--overwrite"], ["another folder"]),
    ],
)
def test_what_a_run_reads_is_checked_before_the_base_is_loaded(
    run: Callable, tiny_folder: Path, dataset: Path, adapters: Path, flags: list[str], messages: list[str]
) -> None:
    output = [] if "-o" in flags else ["-o", "out"]
    ran = run("train", tiny_folder, *flags, *output)
    assert ran.code == 2
    for message in messages:
        assert message in ran.err
    assert not Path("out").exists()


@pytest.mark.usefixtures("no_base")
def test_a_run_file_and_a_sweep_are_checked_as_early(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    Path("run.toml").write_text(
        f'base = "{tiny_folder}"\n[[adapter]]\nname = "a"\ndata = "lines.jsonl"\nfrom = "nowhere"\n'
    )
    for arguments in (["train", "run.toml"], ["sweep", tiny_folder, dataset, "--r", "2,4", "--valid", "nowhere.json"]):
        ran = run(*arguments, "-o", "out")
        assert ran.code == 2
        assert "nowhere" in ran.err


def test_an_adapter_of_another_base_is_not_gone_on_from(
    run: Callable, tiny: LlamaForCausalLM, tiny_folder: Path, dataset: Path
) -> None:
    assert run("train", tiny_folder, dataset, "-o", "parent", "--max-steps", 1).code == 0
    torch.nn.init.ones_(tiny.model.embed_tokens.weight)
    tiny.save_pretrained(tiny_folder)
    ran = run("train", tiny_folder, dataset, "-o", "child", "--from", "parent")
    assert ran.code == 2
    assert "was trained on another base" in ran.err
    assert not Path("child").exists()


def test_a_loss_that_falls_without_a_change_of_the_answers_is_said(
    run: Callable, tiny_folder: Path, dataset: Path
) -> None:
    note = "but the answers to 2 sample prompts are still the base's; try a higher learning rate, or more epochs"
    flags = ["--epochs", 40, "--batch-size", 2, "--valid", "lines.jsonl", "--eval-every", 40, "--dtype", "float32"]
    ran = run("train", tiny_folder, dataset, "-o", "out", *flags, "--lr", 3e-2)
    assert ran.code == 0, ran.err
    assert "still the base's" not in ran.out, "its answers are learned"
    write_pairs(Path("pairs.jsonl"))
    flags = ["--epochs", 20, "--batch-size", 4, "--dpo-sft-weight", 0, "--dpo-beta", 5000, "--lr", 1e-7]
    flags += ["--dtype", "float32"]
    ran = run("train", tiny_folder, "pairs.jsonl", "-o", "unchanged", *flags)
    assert ran.code == 0, ran.err
    losses = [step.loss for step in read_history(Path("unchanged"))["unchanged"].steps]
    assert losses[-1] < 0.9 * losses[0]
    said = f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f}, {note}"
    assert ran.out.count(said) == 2, "in the view and at the end"
    assert read_history(Path("unchanged"))["unchanged"].end.detail == said
    assert f"accuracy {1:.0%}, margin" in ran.out
    ran = run("train", tiny_folder, "pairs.jsonl", "-o", "unasked", *flags, "--samples", 0)
    assert "still the base's" not in ran.out


def test_an_adapter_that_diverges_is_reported_and_not_saved(
    run: Callable, tiny: LlamaForCausalLM, tiny_folder: Path, dataset: Path
) -> None:
    torch.nn.init.constant_(tiny.model.norm.weight, torch.inf)
    tiny.save_pretrained(tiny_folder)
    ran = run("train", tiny_folder, dataset, "-o", "out")
    assert ran.code == 1
    assert "diverged at step 1" in ran.out
    assert not Path("out/adapter_config.json").exists()


def test_tensorboard_gets_the_metrics_too(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    assert run("train", tiny_folder, dataset, "-o", "out", "--max-steps", 1, "--log", "tensorboard").code == 0
    assert [*Path("out").glob("events.out.tfevents.*")]


def test_a_missing_writer_is_reported_before_the_run_begins(
    run: Callable, tiny_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    ran = run("train", tiny_folder, dataset, "-o", "out", "--log", "trackio")
    assert ran.code == 2
    assert "loradeck[trackio]" in ran.err
    assert not Path("out").exists()


def interrupted(run: Callable, *arguments: object) -> Any:
    """Run a command that gets one Ctrl-C, once its metrics have two lines."""

    def watch(*_: object) -> None:
        metrics = Path("out/metrics.jsonl")
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 2:
            signal.setitimer(signal.ITIMER_REAL, 0)
            # An alarm that came during this call is waiting: a second Ctrl-C would end the command at once.
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGALRM, watch)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        return run(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "lines.jsonl"], "is a file"),
        (["-o", "lines.jsonl/x"], "cannot write"),
        (["-o", "a:b"], "':'"),
        (["-o", "out", "--r", "0"], "r is 0, not an integer from 1 to 65536\nSee `loradeck train --help`"),
        (["-o", "out", "--epochs", "0"], "epochs must be an integer of at least 1, not 0"),
        (["-o", "out", "--target-modules", "q_prj"], "q_proj"),
        (["-o", "out", "--lerning-rate", "1"], "--learning-rate"),
    ],
)
def test_invalid_arguments_are_refused_before_training(
    run: Callable, tiny_folder: Path, dataset: Path, flags: list[str], message: str
) -> None:
    ran = run("train", tiny_folder, dataset, *flags)
    assert ran.code == 2
    assert message in ran.err
    assert not Path("out").exists()


def test_bad_lines_are_named(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    dataset.write_text('{"text": "fine"}\n{"text": 1}\nno json\n')
    ran = run("train", tiny_folder, dataset, "-o", "out")
    assert ran.code == 2
    assert "lines.jsonl:2" in ran.err
    assert "lines.jsonl:3" in ran.err
    assert run("train", tiny_folder, "nowhere.jsonl", "-o", "out").code == 2


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("q_proj", ("q_proj",)),
        ("self_attn.q_proj,v_proj", ("self_attn.q_proj", "v_proj")),
        ("attention", "attention"),
        ("all-linear", "all-linear"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
    ],
)
def test_plain_words_are_names_of_modules(written: str, meant: str | tuple[str, ...]) -> None:
    assert suffixes(LoraConfig(target_modules=written)).target_modules == meant
