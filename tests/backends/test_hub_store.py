"""A store in a repository of the hub, of which there is a stand-in here."""

from pathlib import Path

import pytest
from tests.hub_server import TOKEN, Hub
from tests.lora.test_hub import hub, pytestmark  # noqa: F401 (the fixture)
from tests.test_store import adapter

from loradeck.errors import AdapterError, ConfigError, StoreUnreachableError
from loradeck.store import AdapterStore

URL = "hf://owner/adapters/served"


@pytest.fixture
def store(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> AdapterStore:  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("owner/adapters", {"README.md": b"All our adapters."})
    return AdapterStore(URL)


def empty(cache: Path) -> None:
    for folder in (cache / "adapters").glob("*-*"):
        folder.rename(cache / folder.name)


def test_it_is_a_store(store: AdapterStore, hub: Hub, cache: Path) -> None:  # noqa: F811
    assert store.names() == []
    first = store.publish("poet", adapter(2)).sha256()
    second = store.publish("poet", adapter(3)).sha256()
    store.publish("pirate", adapter(2))
    empty(cache)
    hub.asked.clear()
    other = AdapterStore(URL)
    assert [stored.spec for stored in other.latest()] == ["pirate@1", "poet@2"]
    assert not [request for request in hub.asked if "safetensors" in request]
    assert [other.find(spec).sha256() for spec in ("poet@1", "poet")] == [first, second]
    assert other.remove("poet@2") == [2]
    assert AdapterStore(URL).versions("poet") == [1]
    assert other.publish("poet", adapter(4)).version == 3
    files = hub.repositories["owner/adapters"].commits[hub.repositories["owner/adapters"].revisions["main"]]
    assert {path.split("/")[0] for path in files} == {"README.md", "served"}


def test_a_publish_is_two_commits(store: AdapterStore, hub: Hub) -> None:  # noqa: F811
    store.publish("poet", adapter(2))
    assert len(hub.repositories["owner/adapters"].commits) == 3
    assert AdapterStore("hf://owner/adapters@main/served").names() == ["poet"]


def test_a_commit_in_between_takes_no_number_away(store: AdapterStore, hub: Hub) -> None:  # noqa: F811
    """The hub refuses a commit on top of an older one, and then the next number is taken."""
    repository = hub.repositories["owner/adapters"]

    def another() -> None:
        head = repository.commits[repository.revisions["main"]]
        repository.commit(head | {"served/.versions/poet/1.json": b"of another publisher"})

    hub.before_commit = [another, lambda: None]  # the first is for the files, the second for the record
    assert store.publish("poet", adapter(2)).version == 2
    assert AdapterStore(URL).versions("poet") == [1, 2]


def test_a_file_that_is_not_what_was_published(store: AdapterStore, hub: Hub, cache: Path) -> None:  # noqa: F811
    store.publish("poet", adapter(2))
    empty(cache)
    repository = hub.repositories["owner/adapters"]
    files = repository.commits[repository.revisions["main"]]
    [path] = [path for path in files if path.endswith("safetensors")]
    hub.damaged.add(path)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is not what was published"):
        AdapterStore(URL).find("poet")
    assert [*(cache / "adapters").glob("*-*")] == []
    hub.damaged.clear()
    assert AdapterStore(URL).find("poet").version == 1


def test_refusals_are_one_clear_error(store: AdapterStore, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    store.publish("poet", adapter(2))
    with pytest.raises(AdapterError, match=r"the hub has no store owner/nothing, or does not show it to you\n.*log in"):
        AdapterStore("hf://owner/nothing").names()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AdapterError, match=r"hf://owner/adapters/served: .*\nLog in with a token"):
        AdapterStore(URL).publish("poet", adapter(3))
    assert AdapterStore(URL).versions("poet") == [1]
    with pytest.raises(ConfigError, match="names no repository"):
        AdapterStore("hf://owner")


def test_a_hub_that_does_not_answer(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **options: object) -> None:
        raise ConnectionError("reset")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", fail)
    with pytest.raises(StoreUnreachableError, match="cannot be reached: reset"):
        store.names()
