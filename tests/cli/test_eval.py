import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.base import load
from loradeck.base.load import Base
from loradeck.dataset.read import read_dataset
from loradeck.evaluation.config import EvalConfig
from loradeck.evaluation.evaluator import evaluate
from loradeck.lora.bank import Bank

RECORDS = [{"prompt": "Hi", "completion": "Ahoy!"}, {"prompt": "Bye", "completion": "Fair winds"}]
PAIRS = [{"prompt": "Hi", "chosen": "Ahoy!", "rejected": "Hello."}]
BLEND = "adapters/poet*0.7+adapters/pirate*-0.3"


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    """A file, a file of pairs, and folders with a validation split and with a test split too."""
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    for name, content in {
        "data.jsonl": lines,
        "pairs.jsonl": [json.dumps(record) + "\n" for record in PAIRS],
        "valid/train.jsonl": lines,
        "valid/valid.jsonl": lines[:1],
        "test/train.jsonl": lines,
        "test/valid.jsonl": lines[:1],
        "test/test.jsonl": lines[1:],
        "empty.jsonl": [],
    }.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(content))


def test_the_json_is_the_report(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    flags = ["-a", "adapters/poet", "-a", BLEND, "-a", "none", "-a", "adapters/poet"]
    measured = ["--exact-match", "--pattern", "[ao]", "--samples", 1, "--max-new-tokens", 4]
    ran = run("eval", tiny_folder, "data.jsonl", *flags, *measured, "--dtype", "float32", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    base = Base.load(tiny_folder, dtype="float32")
    bank = Bank(base.model)
    for name in ("poet", "pirate"):
        bank.load(adapters / name)
    examples = read_dataset("data.jsonl", base.tokenizer, 1024).train
    config = EvalConfig(exact_match=True, pattern="[ao]", samples=1, max_new_tokens=4)
    entries = {"adapters/poet": "poet", BLEND: {"poet": 0.7, "pirate": -0.3}}
    report = evaluate(base, bank, examples, entries, config)
    assert [each["adapter"] for each in found["adapters"]] == ["none", "adapters/poet", BLEND]
    for one, other in zip(found["adapters"], report.adapters, strict=True):
        assert one["loss"] == pytest.approx(other.loss, abs=1e-5)
        assert one["pattern_rate"] == other.pattern_rate
    assert [each["answers"] for each in found["samples"]] == [each.answers for each in report.samples]


def test_the_table_has_what_was_measured(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    ran = run("eval", tiny_folder, "data.jsonl", "-a", "adapters/poet", "--max-new-tokens", 3)
    assert ran.code == 0, ran.err
    head, _, header, *rows = ran.out.splitlines()
    assert head == "data.jsonl, train: 2 examples, 17 trained tokens"
    assert header.split() == ["adapter", "loss", "perplexity"]
    assert [row.split()[0] for row in rows[:2]] == ["none", "adapters/poet"]
    assert "[dataset] Ahoy!" in ran.out
    assert ran.out.count("[adapters/poet] ") == 2
    ran = run("eval", tiny_folder, "pairs.jsonl", "-a", "adapters/poet", "--samples", 0, "--pattern", "x")
    assert ran.out.splitlines()[2].split() == ["adapter", "loss", "pattern", "accuracy", "margin"]
    assert ran.out.splitlines()[3].split()[-2:] == ["-", "-"]  # the base is the reference


@pytest.mark.parametrize(
    ("dataset", "flags", "split", "examples"),
    [
        ("data.jsonl", [], "train", 2),
        ("valid", [], "valid", 1),
        ("test", [], "test", 1),
        ("test", ["--split", "train"], "train", 2),
        ("test", ["--split", "train", "--limit", 1], "train", 1),
    ],
)
def test_the_split(run: Callable, tiny_folder: Path, dataset: str, flags: list, split: str, examples: int) -> None:
    ran = run("eval", tiny_folder, dataset, "--samples", 0, *flags)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"{dataset}, {split}: {examples} examples, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.jsonl", "-a", "nowhere"], "nowhere"),
        (["data.jsonl", "-a", "adapters/cut"], "adapters/cut"),
        (["data.jsonl", "-a", "adapters/poet*x"], "invalid blend"),
        (["empty.jsonl"], "is empty"),
        (["missing.jsonl"], "no such file"),
        (["data.jsonl", "--split", "test"], "data.jsonl has no test split"),
        (["data.jsonl", "--pattern", "("], "pattern '(' is not a regular expression"),
        (["data.jsonl", "--samples", "-1"], "samples must be an integer of at least 0"),
        (["data.jsonl", "--max-length", "2"], "nothing to train on within max_length"),
    ],
)
def test_what_is_wrong_is_said_before_the_base_loads(
    run: Callable,
    tiny_folder: Path,
    adapters: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(load, "_model", lambda *_, **__: pytest.fail("the base was loaded"))
    ran = run("eval", tiny_folder, *arguments)
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert ran.out == ""


def test_an_adapter_of_another_base_is_refused(
    run: Callable, tmp_path: Path, tiny_folder: Path, adapters: Path
) -> None:
    config = tmp_path / "adapters" / "poet" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    ran = run("eval", tiny_folder, "data.jsonl", "-a", "adapters/poet")
    assert (ran.code, "adapters/poet" in ran.err) == (2, True), ran.err
