import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.cli.prune import prune
from loradeck.store import AdapterStore


@pytest.fixture
def store(adapters: Path) -> AdapterStore:
    """poet@1 to poet@4, pirate@1 to pirate@3, and folders that were never published."""
    store = AdapterStore(adapters)
    for name, count in (("poet", 4), ("pirate", 3)):
        for _ in range(count):
            store.publish(name, adapters / name)
    return store


@pytest.mark.parametrize(
    ("arguments", "poets", "pirates"),
    [
        (["adapters"], [0, 3, 4], [0, 2, 3]),
        (["adapters", "--keep", "1"], [0, 4], [0, 3]),
        (["adapters/poet", "--keep", "1"], [0, 4], [0, 1, 2, 3]),
        (["adapters", "--keep", "9"], [0, 1, 2, 3, 4], [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_old_versions_are_removed(
    run: Callable, store: AdapterStore, arguments: list[str], poets: list[int], pirates: list[int]
) -> None:
    before = {folder: store.versions(folder) for folder in ("poet", "pirate")}
    dry = run("prune", *arguments, "--dry-run")
    assert dry.code == 0, dry.err
    assert before == {folder: store.versions(folder) for folder in ("poet", "pirate")}
    ran = run("prune", *arguments, "--yes")
    assert ran.code == 0, ran.err
    assert (store.versions("poet"), store.versions("pirate")) == (poets, pirates)
    assert "cut" in store.names()
    gone = [f"adapters/poet@{number}" for number in range(1, 5) if number not in poets]
    gone += [f"adapters/pirate@{number}" for number in range(1, 4) if number not in pirates]
    for shown in (dry, ran):
        assert sorted(line.split()[0] for line in shown.out.splitlines()[:-1]) == sorted(gone)
    assert store.publish("poet", store.folder / "poet").version == 5


def test_json(run: Callable, store: AdapterStore) -> None:
    dry = json.loads(run("prune", "adapters/poet", "--dry-run", "--json").out)
    assert (dry["removed"], dry["dry_run"]) == (["adapters/poet@1", "adapters/poet@2"], True)
    assert dry["bytes"] > 2 * store.find("poet").facts.nbytes
    done = json.loads(run("prune", "adapters/poet", "--yes", "--json").out)
    assert done == {**dry, "dry_run": False}
    assert store.versions("poet") == [0, 3, 4]
    assert json.loads(run("prune", "adapters/poet", "--json").out)["removed"] == []


@pytest.mark.parametrize(("answer", "kept"), [("y", [0, 3, 4]), ("", [0, 1, 2, 3, 4]), ("n", [0, 1, 2, 3, 4])])
def test_on_a_terminal_it_asks(
    monkeypatch: pytest.MonkeyPatch, store: AdapterStore, answer: str, kept: list[int]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert prune(store.folder) == int(answer != "y")
    assert store.versions("poet") == kept


def test_without_a_terminal_it_needs_yes(run: Callable, store: AdapterStore) -> None:
    ran = run("prune", "adapters")
    assert (ran.code, "--yes" in ran.err) == (2, True)
    assert store.versions("poet") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapters", "--keep", "0"], "--keep is 0"),
        (["adapters", "--keep", "-1"], "--keep is -1"),
        (["adapters/nobody"], "is named 'nobody'"),
        (["nowhere/poet"], "nowhere cannot be read"),
    ],
    ids=str,
)
def test_mistakes_are_refused(run: Callable, store: AdapterStore, arguments: list[str], message: str) -> None:
    ran = run("prune", *arguments, "--yes")
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert store.versions("poet") == [0, 1, 2, 3, 4]
