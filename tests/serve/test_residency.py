"""Where adapters are: loading, giving way, the tier between, unloading by hand."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loradeck import AdapterStore, Bank, Base
from loradeck.base.twin import twin
from loradeck.errors import AdapterError, UnknownAdapterError
from loradeck.serve.config import EngineConfig
from loradeck.serve.residency import Residency

from .conftest import adapter


@pytest.fixture
def residency(base: Base, store: AdapterStore) -> Iterator[Residency]:
    """Room for two adapters of the store."""
    nbytes = store.find("a3").facts.nbytes
    made = Residency(Bank(twin(base.model)), store, EngineConfig(adapter_bytes=2 * nbytes), lambda: None)
    yield made
    made.close()


def sha(store: AdapterStore, spec: str) -> str:
    return store.find(spec).sha256()


def test_loads_and_gives_way_by_last_use(residency: Residency, store: AdapterStore) -> None:
    residency.load("a1")
    residency.load("a3")
    key, _ = residency.resolve("a1")
    residency.pin(key)
    residency.unpin(key)  # used later than a3
    residency.load("a2")
    tiers = {name: residency.tier(sha(store, name)) for name in ("a1", "a2", "a3")}
    assert tiers == {"a1": "device", "a2": "device", "a3": "disk"}
    assert (residency.loads, residency.evictions) == (3, 1)
    assert residency.bank.names() == [sha(store, "a1"), sha(store, "a2")]
    assert residency.nbytes == sum(store.find(name).facts.nbytes for name in ("a1", "a2"))


def test_what_is_in_use_stays(residency: Residency) -> None:
    for name in ("a2", "a3"):
        residency.load(name)
        residency.pin(residency.resolve(name)[0])
    with pytest.raises(AdapterError, match="no room for a1"):
        residency.load("a1")
    residency.unpin(residency.resolve("a2")[0])
    residency.load("a1")


def test_unloading_waits_for_those_that_use_it(residency: Residency, store: AdapterStore) -> None:
    residency.load("a0")
    key, _ = residency.resolve("a0")
    residency.pin(key)
    residency.unload("a0")
    assert residency.tier(sha(store, "a0")) == "device"
    residency.unpin(key)
    assert residency.tier(sha(store, "a0")) == "disk"
    assert residency.bank.names() == []


def test_unloading_takes_all_versions(residency: Residency, base: Base, store: AdapterStore) -> None:
    residency.load("a0")
    store.publish("a0", adapter(base.model, 9, 2))
    residency.load("a0")
    assert len(residency.residents()) == 2
    residency.unload("a0")
    assert residency.residents() == []


def test_memory_keeps_what_gives_way(residency: Residency, store: AdapterStore) -> None:
    """As on a device with memory of its own."""
    residency.memory_budget = store.find("a0").facts.nbytes + store.find("a1").facts.nbytes
    for name in ("a0", "a1", "a3", "a2"):
        residency.load(name)
    tiers = {name: residency.tier(sha(store, name)) for name in ("a0", "a1", "a2", "a3")}
    assert tiers == {"a0": "memory", "a1": "memory", "a2": "device", "a3": "device"}
    store.remove("a0")  # from disk
    key = ((residency.residents()[0].sha256, 1.0),)
    own = residency.residents()[0]
    assert residency.fetch([(own.sha256, own.stored)], spare=lambda _: False)
    residency.close()
    assert residency.ready(key)


def test_a_failure_is_told_and_tried_again(residency: Residency, store: AdapterStore) -> None:
    file: Path = store.find("a0").path / "adapter_model.safetensors"
    content = file.read_bytes()
    key, found = residency.resolve("a0")
    file.write_bytes(content[:-4] + b"\xff\xff\xff\x7f")
    with pytest.raises(AdapterError):
        residency.load("a0")
    assert residency.residents() == []
    file.write_bytes(content)
    residency.load("a0")
    assert residency.ready(key) or residency.ready(residency.resolve("a0")[0])
    assert found


def test_many_threads_load_one_adapter_once(residency: Residency) -> None:
    threads = [threading.Thread(target=residency.load, args=("a0",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert residency.loads == 1


def test_one_content_under_two_names_is_one_adapter(residency: Residency, store: AdapterStore) -> None:
    store.publish("twin", store.find("a0").path)
    assert residency.resolve("twin")[0] == residency.resolve("a0")[0]
    assert residency.resolve({"twin": 0.5, "a0": 0.25})[0] == ((sha(store, "a0"), 0.75),)


def test_without_a_store_there_is_the_base(base: Base) -> None:
    made = Residency(Bank(twin(base.model)), None, EngineConfig(), lambda: None)
    assert made.resolve(None) == ((), {})
    with pytest.raises(UnknownAdapterError):
        made.resolve("a0")
    made.close()
