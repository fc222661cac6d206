"""Terminals that have few letters, or few columns."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.base.load import Base
from loradeck.cli import VERBS, main
from loradeck.cli.display.encoding import PLAIN, accept_any_text

# Runs the commands of a list in one process and prints a line before each.
COMMANDS = """
import json, sys
from loradeck.cli import main
for command in json.loads(sys.argv[1]):
    print(f"$ {command[0]}", flush=True)
    print(f"exit {main(command)}", flush=True)
"""
ANSWER = '"Grüße", 漢字 🙂 … ★'
RECORDS = [
    {"messages": [{"role": "user", "content": f"Frage {i}: où?"}, {"role": "assistant", "content": f"{ANSWER} {i}"}]}
    for i in range(4)
]


def plain(text: str, monkeypatch: pytest.MonkeyPatch, encoding: str = "ascii") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    accept_any_text()
    print(text, end="", flush=True)
    return stream.buffer.getvalue().decode(encoding)


def test_drawings_keep_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(len(each) == 1 and each.isascii() for each in PLAIN.values())
    assert plain("┤⣿⠁⠀★●…", monkeypatch) == "+** *o~"
    assert plain("▁▄█ │─└", monkeypatch) == "_-# |-+"


def test_other_characters_can_be_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "é漢🙂"
    assert plain(text, monkeypatch) == "\\u00e9\\u6f22\\ud83d\\ude42"
    assert json.loads(f'"{plain(text, monkeypatch)}"') == text
    assert plain("é…", monkeypatch, "latin-1") == "é~"
    assert plain("é…\udc80", monkeypatch, "utf-8") == "é…\\udc80"


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path, adapters: Path) -> Path:
    """A folder with a base, adapters, a dataset, with letters of many scripts in each."""
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    (adapters / "poet").rename(adapters / "poëte")
    os.mkdir(os.fsencode(adapters) + b"/\xff")  # noqa: PTH102 - a name in no encoding
    return tmp_path


def commands() -> dict[str, list[str]]:
    return {
        "check": ["check", "data.jsonl", "--base", "tiny"],
        "check --json": ["check", "data.jsonl", "--json"],
        "train": ["train", "tiny", "data.jsonl", "-o", "out/é", "--max-steps", "2", "--valid", "data.jsonl"],
        "sweep": ["sweep", "tiny", "data.jsonl", "-o", "swept", "--r", "1,2", "--max-steps", "2"],
        "plot": ["plot", "out/é"],
        "plot several": ["plot", "swept"],
        "generate": ["generate", "tiny", ANSWER, "-a", "adapters/poëte", "--max-new-tokens", "9"],
        "generate --json": ["generate", "tiny", ANSWER, "--json", "--max-new-tokens", "9"],
        "chat": ["chat", "tiny", "-a", "adapters/poëte", "--system", "é", "--max-new-tokens", "9"],
        "ls": ["ls", "adapters"],
        "ls --base": ["ls", "adapters", "--base", "tiny"],
        "ls --json": ["ls", "adapters", "--json"],
        "show": ["show", "adapters/poëte"],
        "diff": ["diff", "adapters/poëte", "adapters/pirate", "--headers"],
        "merge": ["merge", "tiny", "adapters/poëte", "-o", "mérged"],
        "convert": ["convert", "adapters/poëte", "--to", "mlx", "--rank", "2", "-o", "pöet"],
        "export": ["export", "adapters/poëte", "--base", "tiny", "-o", "poëte.gguf"],
        "export a model": ["export", "tiny", "-a", "adapters/pirate", "-o", "modèl.gguf"],
        "eval": ["eval", "tiny", "data.jsonl", "-a", "adapters/poëte", "--samples", "1", "--max-new-tokens", "4"],
        "pull": ["pull", "pöet"],
        "push": ["push", "adapters/poëte", "pöet"],
        "publish": ["publish", "adapters/pirate", "störe/pirate"],
        "versions": ["versions", "störe/pirate"],
        "prune": ["prune", "störe", "--yes"],
        "rm": ["rm", "adapters/poëte", "--yes"],
        "doctor": ["doctor"],
        "jobs": ["jobs", "--server", "http://127.0.0.1:9"],
        "--help": ["--help"],
    }


@pytest.mark.slow
def test_the_demo_needs_few_letters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(tmp_path)
    load = Base.load
    monkeypatch.setattr(Base, "load", lambda _: load(tiny_folder))
    assert main(["demo", "--quick"]) == 0
    stream.flush()
    out = stream.buffer.getvalue().decode("ascii")
    assert "switch adapters in" in out
    assert "|" in out
    assert all(len(line) <= 100 for line in out.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("columns", [100, 40])
def test_no_verb_fails_on_a_terminal_with_few_letters_or_columns(folder: Path, columns: int) -> None:
    every = commands()
    assert {verb.split()[0] for verb in every} >= {*VERBS} - {"serve", "studio", "demo"}  # two do not end, one is above
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": str(columns), "NO_COLOR": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([*every.values()])],
        cwd=folder,
        env=environment,
        input="Où?\n/adapter nobödy\n/quit\n".encode(),
        capture_output=True,
    )
    out, err = ran.stdout.decode("ascii"), ran.stderr.decode("ascii")
    assert ran.returncode == 0, err
    assert "Traceback" not in err
    assert "UnicodeEncodeError" not in err
    assert "\\u00fc" in out  # the ü of the dataset
    parts = dict(part.partition("\n")[::2] for part in out.split("$ ")[1:])
    assert "*" in parts["plot"]
    refused = {verb: part for verb, part in parts.items() if not part.rstrip().endswith("exit 0")}
    assert {*refused} <= {"export", "doctor", "pull", "push", "jobs"}, (refused, err)  # no hub, no server


def test_numbers_are_whole_in_narrow_terminals(
    run: Callable, monkeypatch: pytest.MonkeyPatch, adapters: Path, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    for command in (
        ["show", "adapters/poet"],
        ["diff", "adapters/poet", "adapters/pirate", "--headers"],
        ["check", "data.jsonl"],
    ):
        monkeypatch.setenv("COLUMNS", "400")
        wide = run(*command).out
        for columns in (60, 40):
            monkeypatch.setenv("COLUMNS", str(columns))
            narrow = run(*command).out
            assert {*numbers(wide)} <= {*numbers(narrow)}, narrow


def numbers(text: str) -> list[str]:
    return [word.strip(",:") for word in text.split() if word.strip(",:")[:1].isdigit()]
