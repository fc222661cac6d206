import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from loradeck.cli.check import mask

GOOD = '{"prompt": "Hi", "completion": "Ahoy"}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text(GOOD * 2 + '{"prompt": "Bye", "completion": "Fair winds"}\n')
    (tmp_path / "valid.jsonl").write_text(GOOD + '{"prompt": "Bye", "completion": "Off"}\n')
    return tmp_path


def test_a_good_dataset(run: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ran = run("check", folder)
    assert (ran.code, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines()]
    assert ran.out.startswith(f"{folder}: prompt and completion\n")
    assert ["train", "3", "3", "6", "6", "13", "13", "25", "72.0%", "0", "1", "0", "0"] in lines
    assert ["valid", "2", "2", "6", "6", "6", "6", "12", "58.3%", "0", "0", "1", "1"] in lines
    assert "train: duplicate: train.jsonl:2, as train.jsonl:1\n" in ran.out
    assert "valid: also in train: valid.jsonl:1, as train.jsonl:1\n" in ran.out
    assert "valid: prompt in train, with another answer: valid.jsonl:2, as train.jsonl:3\n" in ran.out
    assert "read     Hi\nlearned  Ahoy\n" in ran.out
    assert ran.out.endswith("no problems\n")


def test_with_a_base_it_is_in_tokens(run: Callable, folder: Path, tiny_folder: Path) -> None:
    ran = run("check", folder / "train.jsonl", "--base", tiny_folder)
    assert ran.code == 0
    assert " tokens " in ran.out
    assert "read     <|im_start|>user⏎\nread     Hi<|im_end|>⏎\nread     <|im_start|>assistant⏎\n" in ran.out
    assert "learned  Ahoy<|im_end|>\n" in ran.out
    cut = run("check", folder / "train.jsonl", "--base", tiny_folder, "--max-length", "20")
    assert cut.code == 1
    assert "train.jsonl:1: $: nothing to train on within max_length, 20 tokens" in cut.out


def test_problems_end_with_code_1(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(GOOD + '{"text": 1}\n{"messages": [{"role": "robot"}]}\n')
    ran = run("check", "bad.jsonl")
    assert ran.code == 1
    *_, first, second, count = ran.out.splitlines()
    assert [first, second] == [
        "bad.jsonl:2: $.text: Expected `str`, got `int`",
        "bad.jsonl:3: $.messages[0].role: unknown role 'robot'; expected one of system, user, assistant, tool",
    ]
    assert count.startswith("2 problems: fix or remove these records. Each record has messages, ")
    (tmp_path / "bad.jsonl").write_text(GOOD + '{"text": 1}\n')
    assert run("check", "bad.jsonl").out.splitlines()[-1].startswith("1 problem: ")


def test_json(run: Callable, folder: Path) -> None:
    (folder / "test.jsonl").write_text("{}")
    ran = run("check", folder, "--json")
    report = json.loads(ran.out)
    assert ran.code == 1
    assert report["form"] == "prompt and completion"
    assert report["splits"]["train"]["lengths"] == {"min": 6, "median": 6, "p95": 13, "max": 13}
    assert report["splits"]["train"]["duplicates"] == [{"place": "train.jsonl:2", "of": "train.jsonl:1"}]
    assert report["splits"]["test"]["lengths"] is None
    assert report["first"] == [[["Hi", False], ["Ahoy", True]]]
    [problem] = report["problems"]
    assert (problem["first"], problem["records"]) == (["test.jsonl:1"], 1)


def test_columns_are_suggested_and_the_suggestion_works(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"Question": f"q{n}", "Answer": "a", "id": n} for n in range(30)]
    (tmp_path / "qa.json").write_text(json.dumps(records, indent=1))
    monkeypatch.setenv("COLUMNS", "200")
    ran = run("check", "qa.json")
    assert ran.code == 1
    assert len(ran.out.splitlines()) < 10
    assert "the keys are 'Question', 'Answer', 'id' (in 30 records: also " in ran.out
    flag = "--columns prompt=Question,completion=Answer"
    assert f"1 problem in 30 records: fix or remove these records. Name the columns: {flag}, or in a run" in ran.out
    ran = run("check", "qa.json", *flag.split())
    assert ran.code == 0
    assert "passed over: id (in 30 records)\nno problems\n" in ran.out
    report = json.loads(run("check", "qa.json", *flag.split(), "--json").out)
    assert report["passed_over"][0] == {"what": "id", "records": 30, "first": report["passed_over"][0]["first"]}


def test_columns_that_cannot_be_guessed_are_named(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "tickets.csv").write_text("id,subject,body\n" + "1,help,it broke\n" * 120)
    out = run("check", "tickets.csv").out
    assert "the keys are 'id', 'subject', 'body' (in 120 records: also tickets.csv:3, tickets.csv:4, …)" in out
    assert "Name the columns: --columns prompt=COLUMN,completion=COLUMN" in out
    assert run("check", "tickets.csv", "--columns", "prompt=subject,completion=body").code == 0
    assert run("check", "tickets.csv", "--columns", "subject=prompt").err == (
        "loradeck: columns: 'subject' is no key of a record\nWrite prompt=subject.\n"
    )


def test_long_records_are_left_out_and_counted(run: Callable, tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD + json.dumps({"prompt": "x" * 90, "completion": "y"}))
    ran = run("check", "a.jsonl", "--base", tiny_folder, "--max-length", "64")
    assert ran.code == 1
    assert "Or leave out the long records: --skip-long" in ran.out
    ran = run("check", "a.jsonl", "--base", tiny_folder, "--max-length", "64", "--skip-long")
    assert ran.code == 0
    assert "a.jsonl:2: left out: longer than 64 tokens\nno problems\n" in ran.out


def test_a_missing_dataset_is_an_error(run: Callable) -> None:
    ran = run("check", "missing.jsonl")
    assert (ran.code, ran.out) == (2, "")
    assert "cannot be read" in ran.err


def test_only_a_few_duplicates_are_listed(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD * 10)
    out = run("check", "a.jsonl").out
    assert out.count("duplicate: a.jsonl:") == 3
    assert "train: duplicate: and 6 more\n" in out


def test_untrusted_text_has_no_control_characters(run: Callable, tmp_path: Path) -> None:
    text = json.dumps({"text": "[bold]\x1b[2J\r" + "a" * 2000})
    (tmp_path / "a.jsonl").write_text(text + "\n" + json.dumps({"\x1b[31m": 1}))
    out = run("check", "a.jsonl").out
    assert "\x1b" not in out
    assert "\r" not in out
    assert "learned  [bold]" in out
    assert "a… (1,011 more characters)" in out


def test_in_a_terminal_the_mask_has_colours() -> None:
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system="standard", width=80).print(
        mask([("Hi\n\n", False), ("Ahoy", True)])
    )
    assert file.getvalue() == ("\x1b[2mread     Hi⏎\x1b[0m\n\x1b[2mread     ⏎\x1b[0m\n\x1b[32mlearned  Ahoy\x1b[0m\n")
