import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_origin

import pytest

import loradeck
from loradeck import cli
from loradeck.cli import VERBS, _tokens, main
from loradeck.cli.options import STDIN
from loradeck.errors import DataError

# Runs commands in one process and prints the exit code of each, and whether torch is imported after it.
COMMANDS = """
import contextlib, io, json, sys
from loradeck.cli import main
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(command.split())
    print(json.dumps([code, "torch" in sys.modules]))
"""


@pytest.mark.slow
def test_verbs_that_read_headers_do_not_import_torch(adapters: Path) -> None:
    codes = {
        "lss": 2,
        "--help": 0,
        "train --help": 0,
        "ls adapters": 0,
        "ls adapters --json": 0,
        "show adapters/poet": 0,
        "show adapters/cut": 2,
        "diff adapters/poet adapters/pirate --headers": 0,
        "rm adapters/poet --yes": 0,
    }
    command = [sys.executable, "-c", COMMANDS, json.dumps([*codes])]
    ran = subprocess.run(command, cwd=adapters.parent, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [[code, False] for code in codes.values()]


def test_verbs_are_the_modules_that_define_a_function_of_their_name() -> None:
    folder = Path(cli.__file__).parent
    verbs = {
        path.stem
        for path in folder.glob("*.py")
        if re.search(rf"^def {path.stem}\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert verbs == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_lists_of_arguments_go_on_after_options(verb: str) -> None:
    """cyclopts ends a positional-only list at the first option; *arguments it collects from anywhere."""
    function = getattr(importlib.import_module(f"loradeck.cli.{verb}"), verb)
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            assert get_origin(parameter.annotation) not in (list, tuple, Sequence)


def test_a_dash_is_standard_input_and_after_two_dashes_a_dash() -> None:
    assert _tokens(["generate", "base", "-", "--", "-"]) == ["generate", "base", STDIN, "--", "-"]


def test_every_verb_is_listed_with_a_line_of_help(run: Callable) -> None:
    ran = run("--help")
    assert ran.code == 0
    for verb in VERBS:
        line = next(line for line in ran.out.splitlines() if line.startswith(f"│ {verb} "))
        assert len(line.split()) > 4
    assert run().out == ran.out


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_has_help(run: Callable, verb: str) -> None:
    ran = run(verb, "--help")
    assert ran.code == 0
    flags = [line.strip("│* ") for line in ran.out.splitlines() if line.strip("│* ").startswith("--")]
    assert all(len(flag.split("  ", 1)) == 2 for flag in flags), flags


def test_defaults_are_shown_as_they_are_written(run: Callable) -> None:
    text = " ".join(run("serve", "--help").out.replace("│", " ").split())
    assert "[default: 127.0.0.1]" in text
    assert "()" not in text


def test_the_version_is_the_package_s(run: Callable) -> None:
    assert run("--version").out.strip() == loradeck.__version__


def test_python_m_is_the_same_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "loradeck", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == loradeck.__version__


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["shwo", "x"], 'Unknown command "shwo". Did you mean "show"?'),
        (["ls", "--jsn"], "Unknown option: --jsn. Did you mean --json?"),
        (["show"], "ADAPTER is required."),
        (["train", "a", "b"], "loradeck: --output is required."),
        (["train", "a", "b", "--outputt", "c"], "--output is required. Did you mean --output instead of --outputt?"),
        (["train", "a", "b", "-o"], "-o requires an argument"),
        (["train", "a", "b", "-o", "c", "--epochs", "two"], "--epochs"),
    ],
)
def test_a_typo_is_one_line_and_exit_code_2(run: Callable, command: list[str], message: str) -> None:
    ran = run(*command)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("loradeck: ")
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_an_error_is_one_line_and_a_hint(run: Callable) -> None:
    ran = run("ls", "nowhere")
    assert ran.code == 2
    assert ran.err == (
        "loradeck: no folder nowhere\nGive another, or make one with `loradeck demo` or `loradeck train`.\n"
    )


def test_problems_are_on_their_own_lines(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('basis = "x"\nsampels = 1\n[[adapter]]\nname = "a"\ndata = "b"\n')
    ran = run("train", "run.toml", "-o", "out")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "loradeck: run.toml cannot be run:",
        "  base: must be a string",
        "  basis: unknown key",
        "  sampels: unknown key; did you mean samples?",
        "See docs/training.md for the keys of a run file.",
    ]


def test_errors_contain_no_control_characters(run: Callable) -> None:
    assert "\x1b" not in run("ls", "a\x1b[31mb").err


def test_any_other_exception_keeps_its_traceback(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("loradeck.cli.adapter_folder.read_adapter", fail)
    with pytest.raises(ZeroDivisionError):
        run("show", "x")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (DataError("no"), 2)])
def test_exit_codes(run: Callable, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("loradeck.cli.adapter_folder.read_adapter", fail)
    assert run("show", "x").code == code


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX pipes")
def test_a_closed_pipe_is_not_an_error(adapters: Path) -> None:
    command = [sys.executable, "-m", "loradeck", "ls", str(adapters)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_main_takes_the_process_s_own_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["loradeck", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.strip() == loradeck.__version__
