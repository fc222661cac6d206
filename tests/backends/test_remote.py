"""A store elsewhere: as a folder is, with a cache here. In memory, so that no package is needed."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.test_store import adapter
from transformers import LlamaForCausalLM

from loradeck import Bank
from loradeck.backends import answers, remote
from loradeck.backends.location import is_url
from loradeck.backends.version_file import VersionFile
from loradeck.errors import (
    AdapterError,
    AdapterNameError,
    BusyError,
    ConfigError,
    StoreUnreachableError,
    UnknownAdapterError,
)
from loradeck.store import AdapterStore
from loradeck.stored import Stored


def files_of(store: AdapterStore) -> dict[str, int]:
    place = store._backend.place
    names = place._files().find(place.root, detail=True)
    return {name.removeprefix(f"{place.root}/"): facts["size"] for name, facts in names.items()}


def write(store: AdapterStore, path: str, content: bytes) -> None:
    store._backend.place.replace(path, content)


def test_publish_find_load(memory: AdapterStore, tiny: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = AdapterStore(tmp_path / "folder")
    for r in (2, 3):
        stored, local = memory.publish("poet", adapter(r)), folder.publish("poet", adapter(r))
        assert (stored.spec, stored.facts, stored.sha256()) == (local.spec, local.facts, local.sha256())
        assert stored.equals(local)
    assert (memory.names(), memory.versions("poet")) == (["poet"], [1, 2])
    assert memory.find("poet") == memory.find("poet@latest") == stored
    bank = Bank(tiny)
    bank.load(memory.find("poet@1").path, "first")
    assert bank["first"].config.r == 2
    assert memory.location == memory._backend.place.url


def test_a_bank_says_how_to_load_from_a_url(memory: AdapterStore, tiny: LlamaForCausalLM) -> None:
    with pytest.raises(AdapterError, match=r"memory://x/poet is a URL, not a folder\n.*find\(NAME\).path"):
        Bank(tiny).load("memory://x/poet", "poet")


def test_what_is_told_is_what_a_folder_tells(memory: AdapterStore) -> None:
    memory.publish("poet", adapter(2))
    with pytest.raises(UnknownAdapterError, match=r"no adapter in memory://.*'poem'.*\n.*poet"):
        memory.find("poem")
    with pytest.raises(UnknownAdapterError, match="no version '7'"):
        memory.find("poet@7")
    with pytest.raises(AdapterNameError):
        memory.publish("a/b", adapter(2))
    with pytest.raises(UnknownAdapterError):
        memory.find("../poet")
    assert AdapterStore(f"{memory.location}/none").names() == []


def test_a_name_that_is_the_beginning_of_another(memory: AdapterStore) -> None:
    for name in ("poet", "poet2", "poet [x] #1 ü"):
        memory.publish(name, adapter(2))
    memory.publish("poet", adapter(3))
    assert [memory.versions(name) for name in memory.names()] == [[1, 2], [1], [1]]


def test_only_the_adapters_own_files_are_uploaded(memory: AdapterStore, tmp_path: Path) -> None:
    source = adapter(2).save(tmp_path / "run")
    (source / "metrics.jsonl").write_text("{}")
    (source / "tokenizer_config.json").write_text("{}")
    version = memory.publish("poet", source)
    names = {path.rpartition("/")[2] for path in files_of(memory)}
    tensors = {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer_config.json"}
    assert names == {*tensors, "1.json"}
    assert version.tokenizer_files.names == {"tokenizer_config.json"}


def test_another_process_downloads_it_once(memory: AdapterStore, cache: Path) -> None:
    memory.publish("poet", adapter(2))
    [published] = (cache / "adapters").glob("*-*")
    published.rename(cache / "elsewhere")
    version = AdapterStore(memory.location).find("poet")
    assert version.path == published
    for file in (cache / "elsewhere").iterdir():
        assert (version.path / file.name).read_bytes() == file.read_bytes()
    inode = version.path.stat().st_ino
    assert AdapterStore(memory.location).find("poet").path.stat().st_ino == inode


@pytest.mark.parametrize("change", ["a byte", "cut off", "gone", "another file"])
def test_what_is_damaged_in_the_cache_is_downloaded_again(
    memory: AdapterStore, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = memory.publish("poet", adapter(2)).path
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    match change:
        case "a byte":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut off":
            file.write_bytes(content[:-1])
        case "gone":
            file.unlink()
        case _:
            (folder / "tokenizer.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        version = memory.find("poet")
    assert "is damaged, and downloaded again" in caplog.text
    assert version.path == folder
    assert (folder / "adapter_model.safetensors").read_bytes() == content
    assert not (folder / "tokenizer.json").exists()


def test_a_listing_downloads_no_tensors(memory: AdapterStore, cache: Path) -> None:
    for name in ("poet", "pirate"):
        memory.publish(name, adapter(2))
    for folder in (cache / "adapters").glob("*-*"):
        folder.rename(cache / folder.name)
    store = AdapterStore(memory.location)
    latest, listed = store.latest(), store.listed("poet")
    assert [stored.name for stored in latest] == ["pirate", "poet"]
    assert not any(stored.is_here for stored in latest)
    assert not [*(cache / "adapters").glob("*-*")]
    version = listed[1]
    assert isinstance(version, Stored)
    assert version.facts == memory.find("poet").facts
    assert version.sha256() == memory.find("poet").sha256()
    assert version.created == pytest.approx(memory.find("poet").created, abs=600)
    assert store.problems() == {}


def test_removed_numbers_are_not_used_again(memory: AdapterStore) -> None:
    for r in (2, 3, 4):
        memory.publish("poet", adapter(r))
    assert memory.remove("poet@3") == [3]
    assert memory.find("poet").version == 2
    assert memory.prune("poet", keep=1) == [1]
    assert memory.publish("poet", adapter(5)).version == 4
    assert memory.remove("poet") == [2, 4]
    assert memory.names() == []
    assert {path: size for path, size in files_of(memory).items() if size} == {}
    assert AdapterStore(memory.location).publish("poet", adapter(2)).version == 5


def test_removed_elsewhere_the_version_before_is_found(
    memory: AdapterStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "REFRESH", 3600.0)
    for r in (2, 3):
        memory.publish("poet", adapter(r))
    other = AdapterStore(memory.location)
    assert other.versions("poet") == [1, 2]
    other.listed("poet")  # both records are known, but no file is
    memory.remove("poet@2")
    for folder in (cache / "adapters").glob("*-*"):
        folder.rename(cache / folder.name)
    assert other.find("poet").version == 1


def test_a_version_published_elsewhere_is_seen_when_the_listing_is_old(
    memory: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.publish("poet", adapter(2))
    other = AdapterStore(memory.location)
    assert other.versions("poet") == [1]
    lists: list[str] = []
    list_folder = other._backend.place.list
    monkeypatch.setattr(other._backend.place, "list", lambda folder: lists.append(folder) or list_folder(folder))
    monkeypatch.setattr(answers, "time", SimpleNamespace(monotonic=lambda: 1e9))  # much later
    memory.publish("poet", adapter(3))
    assert [other.find("poet").version for _ in range(5)] == [2] * 5
    assert lists == [".versions/poet"]


def test_one_that_cannot_be_loaded_is_not_published(memory: AdapterStore, tmp_path: Path) -> None:
    source = adapter(2).save(tmp_path / "run")
    (source / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterError):
        memory.publish("poet", source)
    assert files_of(memory) == {}


def test_a_publish_that_fails_leaves_nothing(memory: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = memory._backend.place.upload

    def cut_off(files: dict[str, Path]) -> None:
        upload(dict([*files.items()][:2]))
        raise StoreUnreachableError("gone")

    monkeypatch.setattr(memory._backend.place, "upload", cut_off)
    with pytest.raises(StoreUnreachableError):
        memory.publish("poet", adapter(2))
    assert files_of(memory) == {}


def test_what_the_place_has_not_taken_whole_is_not_published(
    memory: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = memory._backend.place.upload
    monkeypatch.setattr(memory._backend.place, "upload", lambda files: upload(dict([*files.items()][:2])))
    with pytest.raises(StoreUnreachableError, match="has not taken all files of poet"):
        memory.publish("poet", adapter(2))
    assert files_of(memory) == {}


def test_a_record_that_may_be_there_keeps_its_files(memory: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    create = memory._backend.place.create

    def answer_lost(path: str, content: bytes) -> bool:
        create(path, content)
        raise StoreUnreachableError("gone")

    monkeypatch.setattr(memory._backend.place, "create", answer_lost)
    with pytest.raises(StoreUnreachableError):
        memory.publish("poet", adapter(2))
    assert AdapterStore(memory.location).find("poet").facts.r == 2


def test_a_record_whose_answer_was_lost_is_not_written_twice(
    memory: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = memory._backend.place.create
    monkeypatch.setattr(memory._backend.place, "create", lambda *args: create(*args) and create(*args))
    assert memory.publish("poet", adapter(2)).version == 1
    assert memory.versions("poet") == [1]


def test_it_says_that_there_is_no_conditional_write(memory: AdapterStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        memory.publish("poet", adapter(2))
    assert "publish from one process at a time" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: b"[]", "invalid: Expected `object`"),
        (lambda record: record[:50], "invalid: Input data was truncated"),
        (lambda record: record.replace(b"adapter_config.json", b"../../config.json"), "regex"),
        (lambda record: record.replace(b"adapter_config.json", b"evil.json"), "no file of an adapter"),
        (lambda record: record.replace(b"README.md", b"adapter_config.json"), "names a file twice"),
        (lambda record: record.replace(b'"folder":"', b'"folder":"../'), "regex"),
    ],
)
def test_an_invalid_record_is_a_problem_of_its_version_alone(memory: AdapterStore, change, message: str) -> None:
    memory.publish("pirate", adapter(2))
    memory.publish("poet", adapter(2))
    write(memory, ".versions/poet/1.json", change(memory._backend.place.read([".versions/poet/1.json"]).popitem()[1]))
    store = AdapterStore(memory.location)
    assert [stored.name for stored in store.latest()] == ["pirate"]
    assert message in str(store.problems()["poet@1"])
    with pytest.raises(AdapterError, match=r"record of memory://.*poet@1 is invalid"):
        store.find("poet")
    assert store.remove("poet") == [1]
    assert store.names() == ["pirate"]


def test_strange_objects_are_no_versions(memory: AdapterStore) -> None:
    memory.publish("poet", adapter(2))
    for path in (".versions/poet/0.json", ".versions/poet/x.json", ".versions/poet/2", ".versions/y", "notes.txt"):
        write(memory, path, b"strange")
    store = AdapterStore(memory.location)
    assert (store.names(), store.versions("poet"), store.problems()) == (["poet"], [1], {})


def test_the_record_of_a_version_has_the_hashes_of_its_files(memory: AdapterStore) -> None:
    stored = memory.publish("poet", adapter(2))
    content = memory._backend.place.read([".versions/poet/1.json"])[".versions/poet/1.json"]
    assert isinstance(content, bytes)
    version = VersionFile.decode(content, "poet@1")
    assert version.sha256 == stored.sha256()
    assert {file.name: file.size for file in version.files} == {
        path.name: path.stat().st_size for path in stored.path.iterdir()
    }


def test_more_calls_than_may_wait_are_told_so(memory: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.publish("poet", adapter(2))
    store = AdapterStore(memory.location, waiting=1)
    entered, leave = threading.Event(), threading.Event()
    list_folder = store._backend.place.list

    def slow(folder: str) -> dict[str, int]:
        entered.set()
        leave.wait()
        return list_folder(folder)

    monkeypatch.setattr(store._backend.place, "list", slow)
    first = threading.Thread(target=store.find, args=("poet",))
    first.start()
    entered.wait()
    with pytest.raises(BusyError, match="too many requests wait for memory://"):
        store.find("pirate")
    leave.set()
    first.join()
    assert store.find("poet").version == 1  # it waits for nothing


def test_what_is_known_is_served_while_the_place_fails(
    memory: AdapterStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory.publish("poet", adapter(2))
    store = AdapterStore(memory.location)
    version = store.find("poet")

    def fail(folder: str) -> dict[str, int]:
        raise StoreUnreachableError("it does not answer")

    monkeypatch.setattr(store._backend.place, "list", fail)
    monkeypatch.setattr(answers, "REFRESH", 0.0)
    store._backend._versions._answers["poet"] = answers.Answer([1], 0.0)  # long ago
    with caplog.at_level(logging.WARNING):
        assert store.find("poet") == version
    assert "it does not answer; until it answers, its last answer is used" in caplog.text
    with pytest.raises(StoreUnreachableError, match="does not answer"):
        store.find("pirate")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "cannot be at ftp://"),
        ("s3://", "names no bucket"),
        ("memory:///", "names no bucket"),
        ("file://host/x", "on another machine"),
    ],
)
def test_urls_that_are_no_store(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterStore(url)


@pytest.mark.parametrize("size", ["0", "-1", "16 GiB"])
def test_the_bound_of_the_cache_is_a_number(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("LORADECK_CACHE_BYTES", size)
    with pytest.raises(ConfigError, match="LORADECK_CACHE_BYTES"):
        AdapterStore("memory://x/y")


def test_file_urls_are_folders(tmp_path: Path) -> None:
    store = AdapterStore(f"file://{tmp_path}/my%20adapters")
    assert store.publish("poet", adapter(2)).path == tmp_path / "my adapters" / "poet@1"
    assert store.folder == tmp_path / "my adapters"
    assert is_url("S3://x")
    assert not is_url(Path("s3://x"))
    assert not is_url("a:/b")


def test_a_folder_needs_nothing_of_this(tmp_path: Path) -> None:
    adapter(2).save(tmp_path / "poet")
    code = """
import sys
from loradeck.store import AdapterStore
print(AdapterStore(sys.argv[1]).latest()[0].name, AdapterStore(sys.argv[1]).problems())
sys.exit(str([name for name in sys.modules if name.split(".")[0] in ("fsspec", "aiohttp", "huggingface_hub")
              or name in ("loradeck.backends.remote", "loradeck.backends.place")] or ""))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert (done.stdout, done.stderr.strip()) == ("poet {}\n", "")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*args: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ConfigError, match=r"s3://bucket/x needs the package s3fs\npip install s3fs"):
        AdapterStore("s3://bucket/x")


def test_a_fork_has_connections_of_its_own(memory: AdapterStore) -> None:
    place = memory._backend.place
    files = place._files()
    assert place._files() is files
    place._opened = (os.getpid() + 1, files)  # as after a fork
    assert place._files() is not files


def test_retries_end(memory: AdapterStore) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ConnectionError("reset")

    with pytest.raises(StoreUnreachableError, match="reset"):
        memory._backend.place.call(fail)
    assert len(calls) == 5
    assert remote.RETRY_AFTER
