import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.cli.rm import rm
from loradeck.store import AdapterStore


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


@pytest.fixture
def store(adapters: Path) -> AdapterStore:
    """poet@1, poet@2 and pirate@1, beside the folders that were published."""
    store = AdapterStore(adapters)
    for name in ("poet", "poet", "pirate"):
        store.publish(name, adapters / name)
    return store


@pytest.mark.parametrize("spec", ["poet@2", "poet@1/", "./poet@2"])
def test_one_version(run: Callable, store: AdapterStore, spec: str) -> None:
    ran = run("rm", f"adapters/{spec}", "--yes")
    assert ran.code == 0, ran.err
    assert store.versions("poet") == [0, 1 if "2" in spec else 2]
    assert store.publish("poet", store.folder / "poet").version == 3


@pytest.mark.parametrize("unpublished", [True, False])
def test_a_name_is_removed_with_all_its_versions(run: Callable, store: AdapterStore, unpublished: bool) -> None:
    if not unpublished:
        store.remove("poet@0")
    ran = run("rm", "adapters/poet", "--yes")
    assert ran.code == 0, ran.err
    folders = ["adapters/poet"] * unpublished + ["adapters/poet@1", "adapters/poet@2"]
    assert [line.split()[0] for line in ran.out.splitlines()] == [*folders, "removed"]
    assert store.names() == ["cut", "pirate"]
    assert store.publish("poet", store.folder / "pirate").version == 3


def test_a_version_that_is_not_there_is_an_error(run: Callable, store: AdapterStore) -> None:
    for spec in ("poet@9", "nobody", "cut@1"):
        ran = run("rm", "adapters/pirate", f"adapters/{spec}", "--yes")
        assert (ran.code, f"adapters/{spec} is not an adapter's folder" in ran.err) == (2, True)
    assert store.versions("pirate") == [0, 1]


def test_every_file_of_an_adapter_is_removed_and_no_folder(run: Callable, adapters: Path) -> None:
    """Whatever makes `ls` take the folder for an adapter: pickles, shards and their index too."""
    (adapters / "poet" / "adapter_model.bin").write_bytes(b"pickle")
    (adapters / "poet" / "adapter_model.safetensors.index.json").write_text("{}")
    (adapters / "poet" / "adapter_model_checkpoints").mkdir()
    (adapters / "poet" / "notes.txt").write_text("mine")
    assert run("rm", "adapters/poet", "--yes").code == 0
    assert {path.name for path in (adapters / "poet").iterdir()} == {"adapter_model_checkpoints", "notes.txt"}


@pytest.mark.parametrize("name", ["team:x", "a+b", "x@y"])
def test_a_folder_that_cannot_be_served_can_be_removed(run: Callable, adapters: Path, name: str) -> None:
    (adapters / "poet").rename(adapters / name)
    assert run("rm", adapters / name, "--yes").code == 0
    assert sorted(path.name for path in adapters.iterdir()) == ["cut", "pirate"]
