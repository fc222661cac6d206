import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from loradeck.cli.display import reading_progress
from loradeck.dataset.source import Position


def shown(*, terminal: bool, positions: list[Position]) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, _environ={"TERM": "xterm"})
    with reading_progress.reading_progress(console) as on_read:
        for position in positions:
            on_read(position)
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_of_a_short_one(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(reading_progress, "DELAY", 3600.0)
    assert shown(terminal=terminal, positions=[Position(10, 5)] * 100) == ""


def test_a_bar_on_a_terminal_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_progress, "DELAY", 0.0)
    monkeypatch.setattr(reading_progress, "INTERVAL", 0.0)
    text = shown(terminal=True, positions=[Position(10**9, 10**8), Position(10**9, 5 * 10**8)])
    assert "0.5/1.0 GB" in text
    assert text.endswith("\x1b[2K")  # the line is cleared
    assert "reading" in shown(terminal=True, positions=[Position()])


def test_lines_elsewhere_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_progress, "DELAY", 0.0)
    assert shown(terminal=False, positions=[Position(10**9, 10**8)] * 100) == "read 100 MB of 1 GB\n"
    assert shown(terminal=False, positions=[Position()]) == "read 0 B\n"


def test_check_shows_it_beside_its_output(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_progress, "DELAY", 0.0)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    ran = run("check", tmp_path / "a.jsonl", "--json")
    assert ran.out.startswith("{")
    assert ran.err == "read 14 B of 14 B\n"
