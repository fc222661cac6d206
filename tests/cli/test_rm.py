import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.cli.rm import rm


def test_it_removes_the_folder(run: Callable, adapters: Path) -> None:
    ran = run("rm", adapters / "poet", "adapters/cut", "--yes")
    assert ran.code == 0
    assert [path.name for path in adapters.iterdir()] == ["pirate"]


def test_other_files_stay(run: Callable, adapters: Path) -> None:
    (adapters / "poet" / "notes.txt").write_text("mine")
    assert run("rm", adapters / "poet", "-y").code == 0
    assert [path.name for path in (adapters / "poet").iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in adapters.iterdir()) == ["cut", "pirate", "poet"]


@pytest.mark.parametrize("other", ["notes", "nowhere"])
def test_other_folders_are_refused_and_nothing_is_removed(run: Callable, adapters: Path, other: str) -> None:
    (adapters / "notes").mkdir()
    (adapters / "notes" / "README.md").write_text("mine")
    ran = run("rm", adapters / "poet", adapters / other, "--yes")
    assert ran.code == 2
    assert "is not an adapter's folder" in ran.err
    assert (adapters / "poet" / "adapter_config.json").exists()
    assert (adapters / "notes" / "README.md").exists()


def test_a_link_is_refused(run: Callable, adapters: Path) -> None:
    (adapters / "link").symlink_to(adapters / "poet")
    assert run("rm", adapters / "link", "--yes").code == 2
    assert (adapters / "poet" / "adapter_config.json").exists()


def test_without_a_terminal_it_needs_yes(run: Callable, adapters: Path) -> None:
    ran = run("rm", adapters / "poet")
    assert ran.code == 2
    assert "--yes" in ran.err
    assert (adapters / "poet").exists()


@pytest.mark.parametrize(("answer", "stays"), [("y", False), ("", True), ("n", True)])
def test_on_a_terminal_it_asks(monkeypatch: pytest.MonkeyPatch, adapters: Path, answer: str, stays: bool) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert rm(adapters / "poet") == int(stays)
    assert (adapters / "poet").exists() == stays


def test_a_folder_that_cannot_be_changed_is_an_error(
    run: Callable, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    ran = run("rm", adapters / "poet", "--yes")
    assert ran.code == 2
    assert "Permission denied" in ran.err
    assert sorted(path.name for path in adapters.iterdir()) == ["cut", "pirate", "poet"]
