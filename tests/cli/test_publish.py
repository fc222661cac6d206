import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.store import AdapterStore


def test_versions_are_published(run: Callable, adapters: Path) -> None:
    """Into a store that is made by the first one, and back from an older version, named or by its folder."""
    for number, source in enumerate(("adapters/poet", "adapters/pirate/", "store/poet@1"), start=1):
        ran = run("publish", source, "store/poet")
        assert ran.code == 0, ran.err
        assert f"store/poet@{number}: " in ran.out
        assert "now the latest version of poet" in ran.out
    store = AdapterStore("store")
    assert store.versions("poet") == [1, 2, 3]
    assert store.find("poet").sha256() == store.find("poet@1").sha256() != store.find("poet@2").sha256()
    assert run("publish", "store/poet", "store/twin").code == 0
    assert store.find("twin").sha256() == store.find("poet@3").sha256()


def test_json(run: Callable, adapters: Path) -> None:
    report = json.loads(run("publish", "adapters/poet", "store/poet", "--json").out)
    stored = AdapterStore("store").find("poet")
    assert report == {
        "name": "poet", "version": 1, "folder": "store/poet@1", "bytes": stored.facts.nbytes, "sha256": stored.sha256(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("adapters/nobody", "store/poet", "adapters/nobody is not a folder"),
        ("adapters/nowhere/poet", "store/poet", "adapters/nowhere/poet is not a folder"),
        ("nobody-here/poet", "store/poet", "nobody-here/poet is not in the cache, and HF_HUB_OFFLINE is set"),
        ("adapters/cut", "store/poet", "adapters/cut"),
        ("adapters/poet", "poet", "poet does not name an adapter in a store"),
        ("adapters/poet", "adapters/", "adapters/ does not name an adapter in a store"),
        ("adapters/poet", "./adapters", "./adapters does not name an adapter in a store"),
        ("adapters/poet", "store/poet@3", "invalid name: 'poet@3' has the character '@'"),
        ("adapters/poet", "store/team:x", "invalid name: 'team:x' has the character ':'"),
        ("adapters/poet", "store/..", "invalid name: '..' starts with a dot"),
        ("adapters/poet", "file/poet", "cannot be changed"),
    ],
)
def test_what_cannot_be_published_is_refused(
    run: Callable, adapters: Path, source: str, name: str, message: str
) -> None:
    Path("file").write_text("")
    ran = run("publish", source, name)
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert not Path("store").exists()
    assert AdapterStore("adapters").names() == ["cut", "pirate", "poet"]
