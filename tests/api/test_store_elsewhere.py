"""A server whose store is elsewhere: loaded on demand, new versions within seconds, and a place that fails."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.test_store import adapter

from loradeck import AdapterStore, Base
from loradeck.api.metrics import Metrics
from loradeck.backends import answers, place
from loradeck.errors import StoreUnreachableError
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

from .conftest import LocalServer, random_adapter
from .test_hub import answer, request

CHAT = "/v1/chat/completions"


class Elsewhere:
    """A store as another machine has it: what it publishes is not known here."""

    def __init__(self, url: str) -> None:
        self.url = url

    def publish(self, name: str, seed: int) -> None:
        AdapterStore(self.url).publish(name, random_adapter(seed))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """poet and pirate, of which nothing is in this machine's cache."""
    monkeypatch.setattr(place, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "another machine"))
    elsewhere = Elsewhere(f"memory://{tmp_path.name}/adapters")
    for seed, name in enumerate(("poet", "pirate")):
        elsewhere.publish(name, seed)
    monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "cache"))
    return elsewhere


@pytest.fixture
def server(base: Base, elsewhere: Elsewhere, metrics: Metrics) -> Iterator[LocalServer]:
    with Engine(base, AdapterStore(elsewhere.url, waiting=8), EngineConfig(), observer=metrics) as engine:
        yield LocalServer(engine, metrics)


def cached(tmp_path: Path) -> int:
    return len([*(tmp_path / "cache" / "adapters").glob("*-*")])


def fail(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the place fail from now on, and what it answered before be old."""

    def call(*_: object, **options: object) -> None:
        raise StoreUnreachableError(f"{server.engine.store.location} does not answer")

    monkeypatch.setattr(server.engine.store._backend.place, "call", call)
    monkeypatch.setattr(server.engine.store._backend.place, "read", call)
    now = answers.time.monotonic() + 2 * answers.REFRESH
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: now))


def test_a_request_downloads_what_it_names(server: LocalServer, store: AdapterStore, tmp_path: Path) -> None:
    for seed, name in enumerate(("same-poet", "same-pirate")):
        store.publish(name, random_adapter(seed))
    listed = [card["id"] for card in server.request("/v1/models").json()["data"]]
    assert listed == ["tiny", "pirate", "poet"]
    assert cached(tmp_path) == 0
    poet = answer(server, "poet")
    assert cached(tmp_path) == 1
    with Engine(server.engine.base, store, EngineConfig()) as engine:
        assert answer(LocalServer(engine, Metrics("tiny")), "same-poet") == poet
    assert answer(server, "poet@1") == answer(server, "tiny:poet@latest") == poet
    cards = {card["id"]: card["adapter"] for card in server.request("/v1/models").json()["data"][1:]}
    assert {name: card["loaded"] for name, card in cards.items()} == {"pirate": False, "poet": True}


def test_a_new_version_is_served_without_a_listing_for_each_request(
    server: LocalServer, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists: list[str] = []
    backend = server.engine.store._backend
    list_folder = backend.place.list
    monkeypatch.setattr(backend.place, "list", lambda folder: lists.append(folder) or list_folder(folder))
    now = answers.time.monotonic()
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: now))
    before = answer(server, "poet")
    elsewhere.publish("poet", 7)
    assert [answer(server, "poet") for _ in range(5)] == [before] * 5
    assert lists.count(".versions/poet") == 1
    now += answers.REFRESH + 0.1
    after = answer(server, "poet")
    assert after == answer(server, "poet@2") != before
    assert lists.count(".versions/poet") == 2


def test_a_place_that_fails_stops_nothing_that_is_here(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poet, pirate = answer(server, "poet"), answer(server, "pirate")
    assert server.request("/v1/models").status_code == 200
    server.engine.adapter_cache.unload("pirate")  # still on the disk
    fail(server, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert (answer(server, "poet"), answer(server, "pirate")) == (poet, pirate)
        assert len(server.request("/v1/models").json()["data"]) == 3
    assert "its last answer is used" in caplog.text
    response = server.request(CHAT, request("bard"))
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the store does not answer"


def test_clients_do_not_learn_where_it_is(server: LocalServer, elsewhere: Elsewhere, tmp_path: Path) -> None:
    AdapterStore(elsewhere.url).publish("wide", adapter(2, width=8))
    for name, status in (("wide", 422), ("bard", 404)):
        response = server.request(CHAT, request(name))
        assert response.status_code == status
        assert tmp_path.name not in response.text
    assert "wide@1" in server.request(CHAT, request("wide")).text


def test_one_of_another_base_is_not_listed(
    server: LocalServer, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.engine.adapter_cache.bank.model
    monkeypatch.setitem(vars(model), "fingerprint", server.engine.base.fingerprint)
    foreign = random_adapter(3)
    foreign.describe(base_fingerprint="f" * 64)
    AdapterStore(elsewhere.url).publish("foreign", foreign)
    assert "foreign" not in [card["id"] for card in server.request("/v1/models").json()["data"]]
    response = server.request(CHAT, request("foreign"))
    assert response.status_code == 422
    assert "another base" in response.json()["error"]["message"]


def test_versions_are_listed_published_and_removed_over_http(
    server: LocalServer, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    elsewhere.publish("poet", 5)
    cards = server.request("/v1/adapters/poet/versions").json()["data"]
    assert [card["id"] for card in cards] == ["poet@2", "poet@1"]
    assert cached(tmp_path) == 1  # what was published here, not what was listed
    folder = random_adapter(6).save(tmp_path / "outside")
    body = {"lora_name": "bard", "lora_path": str(folder)}
    assert server.request("/v1/load_lora_adapter", body).status_code == 200
    assert AdapterStore(elsewhere.url).names() == ["bard", "pirate", "poet"]
    assert answer(server, "bard") == answer(server, "bard@1")
