import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.classifiers import make, wrapped
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck.lora import peft, safetensors_io
from loradeck.lora.adapter import Adapter
from loradeck.lora.config import LoraConfig
from loradeck.store import AdapterStore


@pytest.fixture(autouse=True)
def wide(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # tables in one piece


def test_it_lists_adapters_and_why_others_are_invalid(run: Callable, adapters: Path) -> None:
    (adapters / ".poet.half-written").mkdir()
    (adapters / "notes").mkdir()
    ran = run("ls")
    assert ran.code == 0
    head, pirate, poet, cut = ran.out.splitlines()
    assert head.split() == ["name", "r", "alpha", "targets", "modules", "parameters", "size", "base"]
    assert pirate.split()[:5] == ["pirate", "8", "8", "embed_tokens,", "q_proj"]
    assert poet.split()[:3] == ["poet", "4", "32"]
    assert " 14 " in poet
    assert cut.startswith("cut is invalid: adapters/cut/adapter_model.safetensors")


def test_one_adapter_is_a_list_of_one(run: Callable, adapters: Path) -> None:
    assert [line.split()[0] for line in run("ls", adapters / "poet").out.splitlines()] == ["name", "poet"]


def test_json(run: Callable, adapters: Path) -> None:
    report = json.loads(run("ls", adapters, "--json").out)
    assert [each["name"] for each in report["adapters"]] == ["pirate", "poet"]
    assert report["adapters"][1]["r"] == [4]
    assert report["adapters"][1]["parameters"] * 4 == report["adapters"][1]["bytes"]
    assert [each["name"] for each in report["broken"]] == ["cut"]


def test_an_empty_folder_has_no_adapters(run: Callable, tmp_path: Path) -> None:
    ran = run("ls", tmp_path)
    assert (ran.code, ran.out) == (0, f"no adapters in {tmp_path}\n")
    assert json.loads(run("ls", tmp_path, "--json").out) == {"adapters": [], "broken": []}


def test_a_file_is_refused(run: Callable, adapters: Path) -> None:
    ran = run("ls", adapters / "poet" / "README.md")
    assert ran.code == 2
    assert "is a file" in ran.err


def test_a_folder_without_permission_does_not_stop_the_others(
    run: Callable, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        if path.parent.name == "pirate":
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    ran = run("ls")
    assert ran.code == 0
    assert "poet " in ran.out
    assert "pirate is invalid: adapters/pirate/adapter_config.json cannot be read: Permission denied" in ran.out


def test_untrusted_names_have_no_control_characters(run: Callable, adapters: Path) -> None:
    (adapters / "poet").rename(adapters / "po\x1b[31met")
    assert "\x1b" not in run("ls").out


# ---- versions and results


def test_the_latest_version_is_marked(run: Callable, adapters: Path) -> None:
    """Versions are sorted as numbers; an unpublished folder is the latest only of a name without versions."""
    store = AdapterStore(adapters)
    for _ in range(11):
        store.publish("poet", adapters / "poet")
    store.publish("pirate", adapters / "pirate")
    rows = [line.split() for line in run("ls").out.splitlines()]
    assert rows[0][-2:] == ["version", "date"]
    names = ["pirate", "pirate@1", "poet", *(f"poet@{number}" for number in range(1, 12))]
    assert [row[0] for row in rows[1:15]] == names
    assert [row[0] for row in rows[1:15] if row[-2] == "latest"] == ["pirate@1", "poet@11"]
    report = json.loads(run("ls", "--json").out)["adapters"]
    assert [each["name"] for each in report if each["latest"]] == ["pirate@1", "poet@11"]
    assert [each["version"] for each in report if each["name"].startswith("pirate")] == [0, 1]


def test_of_one_folder_it_is_known_whether_it_is_the_latest(run: Callable, adapters: Path) -> None:
    """A damaged version is the latest too: requests get its error, never an older version."""
    store = AdapterStore(adapters)
    for _ in range(2):
        store.publish("poet", adapters / "poet")
    for folder, mark in (("poet", "older"), ("poet@1", "older"), ("poet@2", "latest")):
        (row,) = json.loads(run("ls", adapters / folder, "--json").out)["adapters"]
        assert (row["name"], row["latest"]) == (folder, mark == "latest")
    (adapters / "poet@2" / "adapter_config.json").write_text("{")
    assert [each["name"] for each in json.loads(run("ls", "--json").out)["adapters"] if each["latest"]] == ["pirate"]


def test_a_name_that_is_not_utf8(run: Callable, adapters: Path) -> None:
    for name in ("poet", "cut"):
        (adapters / name).rename(adapters / os.fsdecode(name.encode() + b"\xff"))
    report = json.loads(run("ls", "--json").out)
    assert [each["name"] for each in report["adapters"]] == ["pirate", "poet?"]
    assert [each["name"] for each in report["broken"]] == ["cut?"]
    assert report["adapters"][1]["cannot_be_served"].startswith("invalid name: ")
    assert "poet? cannot be served" in run("ls").out


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_in_a_narrow_terminal_each_adapter_has_one_line(
    run: Callable, monkeypatch: pytest.MonkeyPatch, adapters: Path, columns: int
) -> None:
    record(adapters / "poet", dataset="poems.jsonl", loss="0.41238", validation_loss="0.51234", accuracy="0.75")
    AdapterStore(adapters).publish("poet", adapters / "poet")
    wide = run("ls").out.split()
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (("ls",), ("versions", "adapters/poet")):
        lines = run(*command).out.splitlines()
        table = [line for line in lines if line.startswith(("name", "pirate", "poet"))]
        assert [line.split()[0] for line in table] in (
            ["name", "pirate", "poet", "poet@1"],
            ["name", "poet", "poet@1"],
        )
        assert all(len(line) <= columns for line in table)
        assert {*" ".join(table).split()} <= {*wide}
        assert "0.5123" in table[-1]
        (note,) = [line for line in lines if line.startswith("no room for ")]
        heads = note.removeprefix("no room for ").removesuffix("; --json has all").split(", ")
        assert sorted([*table[0].split(), *" ".join(heads).split()]) == sorted(wide[: wide.index("pirate")])


def test_long_texts_of_strangers_stay_on_their_line(run: Callable, adapters: Path) -> None:
    record(adapters / "poet", dataset="two\nlines " + "long " * 99)
    assert len(run("ls").out.splitlines()) == 4


def test_what_training_recorded_is_shown(run: Callable, adapters: Path) -> None:
    """Values that are no numbers, as a stranger's file may have them, are left out."""
    record(adapters / "poet", dataset="poems.jsonl", loss="0.41238", validation_loss="0.5", steps="20", tokens="a lot")
    record(adapters / "pirate", loss="nan", accuracy="1e999")
    head, pirate, poet, _ = [line.split() for line in run("ls").out.splitlines()]
    assert head[-5:] == ["loss", "valid", "loss", "dataset", "date"]
    assert pirate[-4:-1] == ["-", "-", "-"]
    assert poet[-4:-1] == ["0.4124", "0.5", "poems.jsonl"]
    found = {each["name"]: each for each in json.loads(run("ls", "--json").out)["adapters"]}
    assert found["poet"]["results"] == {"loss": 0.41238, "validation_loss": 0.5, "steps": 20}
    assert found["poet"]["dataset"] == "poems.jsonl"
    assert found["pirate"]["results"] == {}
    assert found["pirate"]["date"][:10] == poet[-1]


def record(folder: Path, **results: str) -> None:
    adapter = Adapter.load(folder)
    adapter.describe(**results)
    adapter.save(folder)


# ---- what cannot be served


@pytest.mark.parametrize("name", ["a+b", "team:x", "x@y", "a=b", "a,b", "a*2", "x@0", "x@1@2", "end ", "what?"])
def test_a_name_that_requests_cannot_use_is_marked(run: Callable, adapters: Path, name: str) -> None:
    (adapters / "poet").rename(adapters / name)
    ran = run("ls")
    (line,) = [line for line in ran.out.splitlines() if "cannot be served" in line]
    assert line.startswith(f"{name} cannot be served: invalid name: {name!r} ")
    better = line.partition("Rename the folder, for example to ")[2].strip(".'")
    reports = {each["name"]: each["cannot_be_served"] for each in json.loads(run("ls", "--json").out)["adapters"]}
    assert reports == {name: line.partition(": ")[2], "pirate": None}
    (adapters / name).rename(adapters / better)
    assert "cannot be served" not in run("ls").out
    assert better in AdapterStore(adapters).names()


def test_adapters_that_cannot_be_used_on_a_base_are_marked(
    run: Callable, adapters: Path, tiny: LlamaForCausalLM, tiny_folder: Path
) -> None:
    wide = {"model.layers.0.self_attn.q_proj": (torch.zeros(2, 48), torch.zeros(48, 2))}
    Adapter.of(LoraConfig(r=2), wide).save(adapters / "wide")
    shutil.copytree(adapters / "poet", adapters / "nan")
    with (adapters / "nan" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff" * 4)
    shutil.copytree(adapters / "poet", adapters / "stranger")
    record(adapters / "stranger", base_fingerprint="0" * 64)
    ran = run("ls", "--base", tiny_folder, "--json")
    assert ran.code == 0, ran.err
    reasons = {each["name"]: each["cannot_be_served"] for each in json.loads(ran.out)["adapters"]}
    assert [name for name, reason in reasons.items() if reason is None] == ["pirate", "poet"]
    assert "needs A (2, 64) and B (64, 2) here" in reasons["wide"]
    assert "holds NaN or Inf" in reasons["nan"]
    assert "was trained on another base" in reasons["stranger"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it by its old name
def test_the_base_of_classifiers_is_loaded_for_its_task(
    run: Callable, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    make("bert", "classify", 2, 1).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    wrapped("bert", "classify", 3, 3).save_pretrained(str(tmp_path / "adapters" / "mood"))
    ran = run("ls", "--base", "bert", "--task", "classify")
    assert (ran.code, "cannot be served" in ran.out) == (0, False), ran.out
    ran = run("ls", "--base", "bert")
    assert ran.code != 0 or "mood cannot be served: " in ran.out


# ---- many adapters


def test_each_file_is_opened_once_and_equal_ones_are_parsed_once(
    run: Callable, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work of listing an adapter does not depend on the number of its modules, if another one has the same."""
    for number in range(100):
        shutil.copytree(adapters / "poet", adapters / f"poet-{number}")
        record(adapters / f"poet-{number}", loss=f"{number}.5")
    opened: list[str] = []
    parsed: list[str] = []
    monkeypatch.setattr(os, "open", counted(os.open, opened))
    monkeypatch.setattr(safetensors_io, "_entries", counted(safetensors_io._entries, parsed))
    monkeypatch.setattr(peft, "_parse", counted(peft._parse, parsed))
    rows = run("ls").out.splitlines()
    assert len(rows) == 104
    assert {f"{number}.5" for number in range(100)} <= {row.split()[-2] for row in rows[1:103]}
    assert len([path for path in opened if "poet-" in path]) == 200
    assert len(parsed) <= 6  # of poet, of pirate and of cut


def counted(function: Callable, calls: list[str]) -> Callable:
    def count(path: object, *rest: Any, **options: Any) -> Any:
        calls.append(str(path))
        return function(path, *rest, **options)

    return count
