import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.store import AdapterStore


@pytest.fixture(autouse=True)
def wide(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # tables in one piece


@pytest.fixture
def store(adapters: Path) -> AdapterStore:
    """poet@1 to poet@3, and the folder that was published."""
    store = AdapterStore(adapters)
    for source in ("poet", "pirate", "poet"):
        store.publish("poet", adapters / source)
    return store


def test_all_versions_are_listed(run: Callable, store: AdapterStore) -> None:
    rows = [line.split() for line in run("versions", "adapters/poet").out.splitlines()]
    assert [row[0] for row in rows[1:]] == ["poet", "poet@1", "poet@2", "poet@3"]
    assert [row[-2] for row in rows] == ["version", "unpublished", "older", "older", "latest"]
    assert [row[1] for row in rows[1:]] == ["4", "4", "8", "4"]


def test_json(run: Callable, store: AdapterStore) -> None:
    (store.path("poet", 2) / "adapter_config.json").write_text("{")
    report = json.loads(run("versions", "adapters/poet", "--json").out)
    assert (report["name"], report["latest"]) == ("poet", 3)
    assert [(each["version"], each["latest"]) for each in report["versions"]] == [(0, False), (1, False), (3, True)]
    assert [each["name"] for each in report["broken"]] == ["poet@2"]
    assert "poet@2 is invalid: adapters/poet@2/adapter_config.json" in run("versions", "adapters/poet").out


def test_an_unknown_name_is_an_error(run: Callable, store: AdapterStore) -> None:
    ran = run("versions", "adapters/poe")
    assert (ran.code, "There are: poet" in ran.err) == (2, True)
    ran = run("versions", "adapters")
    assert (ran.code, "adapters is a folder of adapters" in ran.err) == (2, True)
    ran = run("versions", "nowhere/poet")
    assert (ran.code, "nowhere cannot be read" in ran.err) == (2, True)


def test_a_name_shows_its_latest_version(run: Callable, store: AdapterStore) -> None:
    store.remove("poet@0")
    assert run("show", "adapters/poet").out.splitlines()[0] == "poet@3"
    assert json.loads(run("show", "adapters/poet", "--json").out)["version"] == 3
    ran = run("show", "adapters/poe")
    assert (ran.code, "adapters/poe is not a folder" in ran.err) == (2, True)
