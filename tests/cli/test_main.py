import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import loradeck
from loradeck.cli import VERBS, main
from loradeck.errors import DataError

LIGHT = """
import sys
from loradeck.cli import main
code = main(sys.argv[1:])
sys.exit(99 if "torch" in sys.modules else code)
"""


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--help", 0),
        ("train --help", 0),
        ("ls adapters", 0),
        ("ls adapters --json", 0),
        ("show adapters/poet", 0),
        ("show adapters/cut", 2),
        ("diff adapters/poet adapters/pirate --headers", 0),
        ("rm adapters/poet --yes", 0),
        ("lss", 2),
    ],
)
def test_what_reads_headers_imports_no_torch(adapters: Path, command: str, code: int) -> None:
    ran = subprocess.run([sys.executable, "-c", LIGHT, *command.split()], cwd=adapters.parent, capture_output=True)
    assert ran.returncode == code, ran.stderr.decode()


def test_every_verb_is_listed_with_a_line_of_help(run: Callable) -> None:
    ran = run("--help")
    assert ran.code == 0
    for verb in VERBS:
        line = next(line for line in ran.out.splitlines() if line.startswith(f"│ {verb} "))
        assert len(line.split()) > 4
    assert run().out == ran.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_has_help(run: Callable, verb: str) -> None:
    ran = run(verb, "--help")
    assert ran.code == 0
    flags = [line.strip("│* ") for line in ran.out.splitlines() if line.strip("│* ").startswith("--")]
    assert all(len(flag.split("  ", 1)) == 2 for flag in flags), flags


def test_the_version_is_the_package_s(run: Callable) -> None:
    assert run("--version").out.strip() == loradeck.__version__


def test_python_m_is_the_same_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "loradeck", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == loradeck.__version__


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["shwo", "x"], 'Unknown command "shwo". Did you mean "show"?'),
        (["ls", "--jsn"], "Unknown option: --jsn. Did you mean --json?"),
        (["show"], "requires an argument"),
        (["train", "a", "b", "-o", "c", "--epochs", "two"], "--epochs"),
    ],
)
def test_a_slip_of_the_pen_is_one_line_and_exit_code_2(run: Callable, command: list[str], said: str) -> None:
    ran = run(*command)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("loradeck: ")
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_an_error_is_one_line_and_how_to_mend_it(run: Callable) -> None:
    ran = run("ls", "nowhere")
    assert ran.code == 2
    assert ran.err == (
        "loradeck: there is no folder nowhere\nName one, or make one with `loradeck demo` or `loradeck train`.\n"
    )


def test_problems_are_lines_that_can_be_jumped_to(run: Callable, tmp_path: Path) -> None:
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


def test_errors_cannot_steer_the_terminal(run: Callable) -> None:
    assert "\x1b" not in run("ls", "a\x1b[31mb").err


def test_any_other_exception_keeps_its_traceback(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("loradeck.lora.manifest.read_folder", fail)
    with pytest.raises(ZeroDivisionError):
        run("show", "x")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (DataError("no"), 2)])
def test_exit_codes(run: Callable, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("loradeck.lora.manifest.read_folder", fail)
    assert run("show", "x").code == code


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX pipes")
def test_a_reader_that_leaves_is_no_error(adapters: Path) -> None:
    command = [sys.executable, "-m", "loradeck", "ls", str(adapters)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_main_takes_the_process_s_own_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["loradeck", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.strip() == loradeck.__version__
