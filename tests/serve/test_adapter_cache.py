"""Where adapters are: loading, giving way, the tier between, unloading by hand."""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import adapter

from loradeck import AdapterStore, Bank, Base
from loradeck.base.weights import shared_copy
from loradeck.errors import AdapterError, BusyError, ConfigError, LoradeckError, UnknownAdapterError
from loradeck.lora import safetensors_io
from loradeck.serve.adapter_cache import AdapterCache
from loradeck.serve.config import EngineConfig

from .conftest import until


@pytest.fixture
def adapter_cache(base: Base, store: AdapterStore) -> Iterator[AdapterCache]:
    """Room for two adapters of the store."""
    nbytes = store.find("a3").facts.nbytes
    made = AdapterCache(Bank(shared_copy(base.model)), store, EngineConfig(adapter_bytes=2 * nbytes), lambda: None)
    yield made
    made.close()


def sha(store: AdapterStore, spec: str) -> str:
    return store.find(spec).sha256()


class Slow:
    """Call it with what reads an adapter: it does so in a thread, and waits in the middle until `go`."""

    def __init__(self, read: Callable[..., Any]) -> None:
        self._read, self._begun, self._go = read, threading.Event(), threading.Event()
        self._slow = False

    def __call__(self, work: Callable[[], object]) -> threading.Thread:
        self._slow = True
        thread = threading.Thread(target=work)
        thread.start()
        assert self._begun.wait(120)
        return thread

    def go(self) -> None:
        self._go.set()

    def read(self, *arguments: Any) -> Any:
        if self._slow:
            self._slow = False  # the next one is quick
            self._begun.set()
            assert self._go.wait(120)
        return self._read(*arguments)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    made = Slow(safetensors_io.read_body)
    monkeypatch.setattr(safetensors_io, "read_body", made.read)
    yield made
    made.go()


def test_loads_and_gives_way_by_last_use(adapter_cache: AdapterCache, store: AdapterStore) -> None:
    adapter_cache.load("a1")
    adapter_cache.load("a3")
    key, _ = adapter_cache.resolve("a1")
    adapter_cache.pin(key)
    adapter_cache.unpin(key)  # used later than a3
    adapter_cache.load("a2")
    tiers = {name: adapter_cache.tier(sha(store, name)) for name in ("a1", "a2", "a3")}
    assert tiers == {"a1": "device", "a2": "device", "a3": "disk"}
    assert (adapter_cache.loads, adapter_cache.evictions) == (3, 1)
    assert adapter_cache.bank.names() == [sha(store, "a1"), sha(store, "a2")]
    assert adapter_cache.nbytes == sum(store.find(name).facts.nbytes for name in ("a1", "a2"))


def test_adapters_take_a_base_in_bfloat16_for_theirs(base: Base, store: AdapterStore) -> None:
    """And are counted as what they take then; on another base they keep what their file has."""
    for dtype, share in ((torch.bfloat16, 2), (torch.float32, 1)):
        adapter_cache = AdapterCache(Bank(copy.deepcopy(base.model).to(dtype)), store, EngineConfig(), lambda: None)
        adapter_cache.load("a1")
        own = adapter_cache.bank[sha(store, "a1")]
        assert {parameter.dtype for parameter in own.parameters()} == {dtype}
        assert adapter_cache.nbytes == own.nbytes == store.find("a1").facts.nbytes / share
        adapter_cache.close()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("copies", [False, True])
def test_adapters_are_counted_as_they_are_loaded(
    base: Base, store: AdapterStore, base_dtype: torch.dtype, file_dtype: torch.dtype, copies: bool
) -> None:
    """In the dtype and without the copies of the base's weights that PEFT saves, before they are loaded and after."""
    model = copy.deepcopy(base.model).to(base_dtype)
    file = store.find("a1").path / "adapter_model.safetensors"
    tensors = {key: tensor.to(file_dtype) for key, tensor in load_file(file).items()}
    head = {"base_model.model.lm_head.weight": model.lm_head.weight.clone()} if copies else {}
    save_file({**tensors, **head}, file, {"format": "pt"})
    values = sum(tensor.numel() for tensor in tensors.values())
    nbytes = values * (torch.bfloat16 if base_dtype == torch.bfloat16 else file_dtype).itemsize
    for room, fits in ((nbytes, True), (nbytes - 1, False)):
        adapter_cache = AdapterCache(Bank(model), store, EngineConfig(adapter_bytes=room), lambda: None)
        if fits:
            adapter_cache.load("a1")
            assert adapter_cache.nbytes == adapter_cache.bank[sha(store, "a1")].nbytes == nbytes
        else:
            with pytest.raises(ConfigError, match=f"a1@1 takes {nbytes} bytes, more than adapter_bytes={room}"):
                adapter_cache.load("a1")
        adapter_cache.close()
        adapter_cache.bank.detach()


def test_what_is_in_use_stays(adapter_cache: AdapterCache) -> None:
    for name in ("a2", "a3"):
        adapter_cache.load(name)
        adapter_cache.pin(adapter_cache.resolve(name)[0])
    with pytest.raises(AdapterError, match="no room for a1"):
        adapter_cache.load("a1")
    adapter_cache.unpin(adapter_cache.resolve("a2")[0])
    adapter_cache.load("a1")


def test_unloading_waits_for_those_that_use_it(adapter_cache: AdapterCache, store: AdapterStore) -> None:
    adapter_cache.load("a0")
    key, _ = adapter_cache.resolve("a0")
    adapter_cache.pin(key)
    adapter_cache.unload("a0")
    assert adapter_cache.tier(sha(store, "a0")) == "device"
    adapter_cache.unpin(key)
    assert adapter_cache.tier(sha(store, "a0")) == "disk"
    assert adapter_cache.bank.names() == []


def test_unloading_takes_all_versions(adapter_cache: AdapterCache, base: Base, store: AdapterStore) -> None:
    adapter_cache.load("a0")
    store.publish("a0", adapter(base.model, 9, 2))
    adapter_cache.load("a0")
    assert len(adapter_cache.residents()) == 2
    adapter_cache.unload("a0")
    assert adapter_cache.residents() == []


def test_memory_keeps_what_gives_way(adapter_cache: AdapterCache, store: AdapterStore) -> None:
    """As on a device with memory of its own."""
    adapter_cache.memory_budget = store.find("a0").facts.nbytes + store.find("a1").facts.nbytes
    for name in ("a0", "a1", "a3", "a2"):
        adapter_cache.load(name)
    tiers = {name: adapter_cache.tier(sha(store, name)) for name in ("a0", "a1", "a2", "a3")}
    assert tiers == {"a0": "memory", "a1": "memory", "a2": "device", "a3": "device"}
    key, adapters = adapter_cache.resolve("a0")
    store.remove("a0")  # from disk
    assert adapter_cache.fetch(adapters, keep=lambda _: False)
    assert until(lambda: adapter_cache.ready(key))
    assert adapter_cache.nbytes <= adapter_cache.budget
    assert sum(own.nbytes for own in adapter_cache.residents() if own.tier == "memory") <= adapter_cache.memory_budget


def test_unloading_gives_back_what_is_kept_in_memory(adapter_cache: AdapterCache, store: AdapterStore) -> None:
    adapter_cache.memory_budget = store.find("a0").facts.nbytes
    adapter_cache.load("a0")
    gone = weakref.ref(adapter_cache.bank[sha(store, "a0")])
    adapter_cache.load("a3")
    adapter_cache.load("a2")
    assert adapter_cache.tier(sha(store, "a0")) == "memory"
    adapter_cache.unload("a0")
    assert adapter_cache.tier(sha(store, "a0")) == "disk"
    assert gone() is None


def test_unloading_by_another_name_of_the_same_content(adapter_cache: AdapterCache, store: AdapterStore) -> None:
    store.publish("twin", store.find("a0").path)
    adapter_cache.load("a0")
    adapter_cache.unload("twin")
    assert adapter_cache.residents() == []


def test_unloading_while_it_loads(adapter_cache: AdapterCache, store: AdapterStore, slow: "Slow") -> None:
    loading = slow(lambda: adapter_cache.load("a0"))
    adapter_cache.unload("a0")
    slow.go()
    loading.join()
    assert adapter_cache.residents() == []
    adapter_cache.load("a0")
    assert adapter_cache.tier(sha(store, "a0")) == "device"


def test_a_slow_disk_keeps_nothing_else_waiting(adapter_cache: AdapterCache, store: AdapterStore, slow: "Slow") -> None:
    """The loop evicts, pins and unloads while an adapter is read."""
    for name in ("a1", "a2"):
        adapter_cache.load(name)
    adapter_cache.budget += store.find("a3").facts.nbytes
    loading = slow(lambda: adapter_cache.load("a3"))
    key, adapters = adapter_cache.resolve("a0")
    done = threading.Event()

    def others() -> None:
        adapter_cache.unload("a1")
        assert adapter_cache.fetch(adapters, keep=lambda _: False)
        assert adapter_cache.pin(adapter_cache.resolve("a2")[0])
        done.set()

    thread = threading.Thread(target=others)
    thread.start()
    assert done.wait(120)
    assert adapter_cache.tier(sha(store, "a1")) == "disk"
    assert loading.is_alive()
    slow.go()
    thread.join()
    loading.join()
    assert until(lambda: adapter_cache.ready(key))
    assert adapter_cache.tier(sha(store, "a3")) == "device"


def test_what_was_taken_away_cannot_be_pinned(adapter_cache: AdapterCache) -> None:
    adapter_cache.load("a0")
    adapter_cache.load("a1")
    key, _ = adapter_cache.resolve({"a0": 1.0, "a1": 1.0})
    adapter_cache.unload("a1")
    assert not adapter_cache.pin(key)
    assert [own.pins for own in adapter_cache.residents()] == [0]


def test_a_failure_is_told_and_tried_again(adapter_cache: AdapterCache, store: AdapterStore) -> None:
    file: Path = store.find("a0").path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\xff\xff\xff\x7f")
    with pytest.raises(AdapterError, match="NaN or Inf"):
        adapter_cache.load("a0")
    assert adapter_cache.residents() == []
    failures = adapter_cache.failures()
    assert [type(error) for error in failures.values()] == [AdapterError]
    assert adapter_cache.failures() == {}
    file.write_bytes(content)
    adapter_cache.load("a0")
    assert adapter_cache.ready(adapter_cache.resolve("a0")[0])


def test_a_failure_is_no_news_once_it_is_tried_again(
    adapter_cache: AdapterCache, slow: "Slow", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a request that got its adapter at the second try would be failed for the first."""
    with monkeypatch.context() as patched:
        patched.setattr(adapter_cache.bank, "load", lambda *_: torch.empty(1 << 60))
        with pytest.raises(AdapterError, match="a0@1 could not be loaded"):
            adapter_cache.load("a0")
    loading = slow(lambda: adapter_cache.load("a0"))
    assert adapter_cache.failures() == {}
    slow.go()
    loading.join()
    assert adapter_cache.ready(adapter_cache.resolve("a0")[0])


def test_a_folder_that_changes_while_it_is_read_is_not_taken(
    adapter_cache: AdapterCache, store: AdapterStore, slow: "Slow"
) -> None:
    failed: list[LoradeckError] = []

    def load() -> None:
        try:
            adapter_cache.load("a0")
        except LoradeckError as error:
            failed.append(error)

    loading = slow(load)
    config = store.find("a0").path / "adapter_config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    slow.go()
    loading.join()
    assert "changed" in str(failed[0])
    assert adapter_cache.residents() == []
    assert adapter_cache.bank.names() == []


def test_a_blend_beyond_the_budget_is_refused(adapter_cache: AdapterCache) -> None:
    with pytest.raises(ConfigError, match="a1@1 and a2@1 and a3@1 take"):
        adapter_cache.resolve({"a1": 0.5, "a2": 0.2, "a3": 0.3})


def test_closing_ends_loads_and_keeps_nothing(base: Base, store: AdapterStore, slow: "Slow") -> None:
    config = EngineConfig(adapter_bytes=2 * store.find("a3").facts.nbytes, loaders=1)
    adapter_cache = AdapterCache(Bank(shared_copy(base.model)), store, config, lambda: None)
    adapter_cache.memory_budget = 1 << 30
    for name in ("a0", "a3", "a2"):
        adapter_cache.load(name)
    gone = weakref.ref(next(own.host_copy for own in adapter_cache.residents() if own.host_copy))
    told: list[str] = []

    def load(name: str) -> None:
        try:
            adapter_cache.load(name)
            told.append(f"{name} there")
        except BusyError:
            told.append(f"{name} busy")

    adapter_cache.unload("a2")
    adapter_cache.unload("a3")
    loading = slow(lambda: load("a1"))
    queued = threading.Thread(target=load, args=("a2",))
    queued.start()
    assert until(lambda: adapter_cache._loaders._work_queue.qsize() == 1)
    closing = threading.Thread(target=adapter_cache.close)
    closing.start()
    queued.join(120)
    slow.go()
    for thread in (loading, queued, closing):
        thread.join(120)
        assert not thread.is_alive()
    assert sorted(told) == ["a1 there", "a2 busy"]
    assert adapter_cache.residents() == []
    assert gone() is None
    with pytest.raises(BusyError):
        adapter_cache.load("a0")
    assert adapter_cache.residents() == []


def test_many_threads_load_one_adapter_once(adapter_cache: AdapterCache) -> None:
    threads = [threading.Thread(target=adapter_cache.load, args=("a0",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert adapter_cache.loads == 1


def test_one_content_under_two_names_is_one_adapter(adapter_cache: AdapterCache, store: AdapterStore) -> None:
    store.publish("twin", store.find("a0").path)
    assert adapter_cache.resolve("twin")[0] == adapter_cache.resolve("a0")[0]
    assert adapter_cache.resolve({"twin": 0.5, "a0": 0.25})[0] == ((sha(store, "a0"), 0.75),)


def test_without_a_store_there_is_the_base(base: Base) -> None:
    made = AdapterCache(Bank(shared_copy(base.model)), None, EngineConfig(), lambda: None)
    assert made.resolve(None) == ((), {})
    with pytest.raises(UnknownAdapterError):
        made.resolve("a0")
    made.close()
