import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loradeck.cli.train import suffixes
from loradeck.lora.config import LoraConfig
from loradeck.lora.layout import read_folder
from loradeck.train import trainer

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
    assert listing.origin.provenance.keys() >= {"base_fingerprint", "chat_template_sha256", "data_sha256", "steps"}
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
    assert run("train", tiny_folder, dataset, "-o", adapters / "poet", "--max-steps", 1, "--overwrite").code == 0
    assert (adapters / "poet" / "adapter_model.safetensors").read_bytes() != before
    assert (adapters / "poet" / "notes.txt").read_text() == "mine"


def test_a_dry_run_prints_the_plan_and_writes_nothing(run: Callable, tiny_folder: Path, dataset: Path) -> None:
    before = sorted(Path().iterdir())
    ran = run("train", tiny_folder, dataset, "-o", "out/new", "--dry-run")
    assert ran.code == 0
    assert "learning rate" in ran.out
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("steps", [0, 1])
def test_ctrl_c_saves_what_there_is(
    run: Callable, tiny_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    real = trainer.train

    def interrupted(*arguments: Any, **options: Any) -> trainer.TrainResult:
        *rest, recipe = arguments
        result = real(*rest, replace(recipe, max_steps=1), **options) if steps else trainer.TrainResult()
        result.interrupted = True
        return result

    monkeypatch.setattr(trainer, "train", interrupted)
    ran = run("train", tiny_folder, dataset, "-o", "out", "--max-steps", 5)
    assert ran.code == 130
    assert "interrupted" in ran.out
    assert Path("out/adapter_config.json").exists() == bool(steps)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-o", "lines.jsonl"], "is a file"),
        (["-o", "lines.jsonl/x"], "cannot be written"),
        (["-o", "a:b"], "':'"),
        (["-o", "out", "--r", "0"], "r is 0"),
        (["-o", "out", "--epochs", "0"], "epochs is 0"),
        (["-o", "out", "--target-modules", "q_prj"], "q_proj"),
        (["-o", "out", "--lerning-rate", "1"], "--learning-rate"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    run: Callable, tiny_folder: Path, dataset: Path, flags: list[str], said: str
) -> None:
    ran = run("train", tiny_folder, dataset, *flags)
    assert ran.code == 2
    assert said in ran.err
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
def test_words_are_names_of_modules(written: str, meant: str | tuple[str, ...]) -> None:
    assert suffixes(LoraConfig(target_modules=written)).target_modules == meant
