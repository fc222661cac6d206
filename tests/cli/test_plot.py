import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from loradeck.cli.plot import plot
from loradeck.train.events import AnyEvent, Evaluation, Step, encode


def events(job: str, count: int = 40, *, evaluate: bool = True) -> list[AnyEvent]:
    steps: list[AnyEvent] = [
        Step(
            job=job,
            step=number,
            seconds=2.0 * number,
            took=2.0,
            steps=count,
            loss=3.0 + (-1.0) ** number / number,
            learning_rate=1e-4,
            grad_norm=1.0,
            tokens=100 * number,
            supervised=10,
            memory=1,
        )
        for number in range(1, count + 1)
    ]
    if evaluate:
        steps += [
            Evaluation(job=job, step=at, seconds=1.0, loss=4.0 - at / count, tokens=5, best=True) for at in (20, 40)
        ]
    return steps


def write(folder: str, *events: AnyEvent) -> Path:
    path = Path(folder)
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_bytes(b"".join(map(encode, events)))
    return path


def test_a_run_in_the_terminal(run: Callable) -> None:
    write("out/poet", *events("poet"))
    ran = run("plot", "out/poet")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "loss (nats)"
    assert lines[-1].startswith("━━ poet  ")
    assert lines[-1].endswith("★ validation 3 at step 40")
    assert max(map(len, lines)) == 100
    assert "●" in ran.out
    assert run("plot", "out/poet/metrics.jsonl").out == ran.out


@pytest.mark.parametrize(
    ("metric", "title", "value"),
    [
        ("validation", "validation loss (nats)", "3.5 -> 3"),
        ("learning_rate", "learning rate", "0.0001 -> 0.0001"),
        ("tokens_per_second", "tokens per second", "50 -> 50"),
    ],
)
def test_other_metrics(run: Callable, metric: str, title: str, value: str) -> None:
    write("out", *events("poet"))
    ran = run("plot", "out", "--metric", metric)
    assert ran.out.splitlines()[0] == title
    assert f"out/poet  {value}" in ran.out


def test_several_runs_share_a_plot(run: Callable) -> None:
    write("a/out", *events("poet"), *events("judge"))
    write("b/other", *events("poet"))
    assert {
        f"{letter} {label}" for letter, label in zip("abc", ("out/poet", "out/judge", "other/poet"), strict=True)
    } == {line.partition("  ")[0] for line in run("plot", "a/out", "b/other").out.splitlines()[-3:]}
    write("c/out", *events("poet"))
    labels = [line.split()[1] for line in run("plot", "a/out", "c/out").out.splitlines()[-3:]]
    assert labels == ["a/out/poet", "a/out/judge", "c/out/poet"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "begin"), [("plot.png", b"\x89PNG"), ("plot.svg", b"<?xml")])
@pytest.mark.parametrize("jobs", [1, 12])
def test_a_picture(run: Callable, name: str, begin: bytes, jobs: int) -> None:
    names = [f"_job$\\frac{number}" for number in range(jobs)]  # labels that matplotlib would hide, or fail on
    write("run", *(event for job in names for event in events(job)))
    for metric in ("loss", "validation"):
        ran = run("plot", "run", "-o", name, "--metric", metric)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(f"{name}: run/_job$")
        assert Path(name).read_bytes().startswith(begin)


def test_a_picture_names_every_curve(run: Callable) -> None:
    write("run", *events("_poet"), *events("judge$1$"))
    run("plot", "run", "-o", "plot.svg")
    svg = Path("plot.svg").read_text()
    assert "run/_poet" in svg
    assert "run/judge$1$" in svg
    assert "loss (nats)" in svg


@pytest.mark.parametrize("name", ["plot.txt", "nowhere/plot.png"])
def test_a_picture_that_cannot_be_written_is_refused(run: Callable, name: str) -> None:
    write("run", *events("poet"))
    ran = run("plot", "run", "-o", name)
    assert ran.code == 2
    assert f"cannot write {name}" in ran.err


def test_without_matplotlib_it_says_what_to_install(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write("run", *events("poet"))
    ran = run("plot", "run", "-o", "plot.png")
    assert ran.code == 2
    assert "pip install 'loradeck[plot]'" in ran.err
    assert run("plot", "run").code == 0


def test_nothing_to_plot_is_an_error(run: Callable) -> None:
    write("empty")
    write("run", *events("poet", evaluate=False))
    for arguments, message in {
        (): "no run to plot",
        ("nowhere",): "nowhere cannot be read",
        ("empty",): "empty/metrics.jsonl has no events",
        ("run", "--metric", "validation"): "no validation loss in run",
    }.items():
        ran = run("plot", *arguments)
        assert ran.code == 2
        assert message in ran.err


def test_a_bad_line_is_named(run: Callable) -> None:
    file = write("run", *events("poet")) / "metrics.jsonl"
    file.write_bytes(b"nonsense\n" + file.read_bytes())
    ran = run("plot", "run")
    assert ran.code == 2
    assert "run/metrics.jsonl:1: " in ran.err


def test_untrusted_names_have_no_control_characters(run: Callable) -> None:
    write("ru\x1b[2Jn", *events("po\x1b[2Jet"))
    ran = run("plot", "ru\x1b[2Jn")
    assert "ru�[2Jn/po�[2Jet" in ran.out
    assert "\x1b" not in ran.out


def test_a_terminal_gets_colour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=60, height=20, _environ={"TERM": "xterm"}, highlight=False)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    plot(write("one", *events("poet")), write("two", *events("poet")))
    assert "\x1b[36m━━ \x1b[0mone/poet" in file.getvalue()
    assert "\x1b[35m━━ \x1b[0mtwo/poet" in file.getvalue()
