"""The store: names, versions, identity; damage, removal and changes by others; kill -9, and races."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.digest import digest
from transformers import LlamaForCausalLM

from loradeck import Adapter, Bank, LoraConfig
from loradeck.backends.folder import remove_adapter
from loradeck.errors import AdapterError, AdapterNameError, ConfigError, UnknownAdapterError, UnsupportedError
from loradeck.lora.manifest import is_adapter
from loradeck.store import AdapterStore
from loradeck.stored import Stored, read_stored

Q = "model.layers.{}.self_attn.q_proj"


def adapter(r: int = 2, layers: int = 2, width: int = 64) -> Adapter:
    generator = torch.Generator().manual_seed(r)
    pairs = {
        Q.format(i): (torch.randn(r, width, generator=generator), torch.randn(width, r, generator=generator))
        for i in range(layers)
    }
    made = Adapter.of(LoraConfig(r=r, lora_alpha=3 * r), pairs)
    made.origin = replace(made.origin, base_model="org/tiny")
    return made


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A PEFT folder as a training run leaves it."""
    folder = adapter(2).save(tmp_path / "runs" / "poet", notes="How it was made.")
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "checkpoints").mkdir()
    return folder


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def records(store: AdapterStore) -> list[str]:
    return sorted(path.name for path in (store.folder / ".versions").iterdir())


# ---- a folder of PEFT folders


def test_a_folder_of_peft_folders_is_a_store(store: AdapterStore) -> None:
    for name, r in (("poet", 2), ("pirate", 3)):
        adapter(r).save(store.folder / name)
    assert store.names() == ["pirate", "poet"]
    assert store.versions("poet") == [0]
    assert store.find("poet") == store.find("poet@latest") == store.find("poet@0")
    assert [each.name for each in store.latest()] == ["pirate", "poet"]
    assert store.problems() == {}
    assert visible(store.folder) == {"poet", "pirate"}


def test_the_facts_of_an_adapter(store: AdapterStore) -> None:
    pair = (torch.zeros(4, 6), torch.zeros(5, 4))
    made = Adapter.of(
        LoraConfig(r=2, lora_alpha=8), {"a.up": pair, "b.up": pair, "b.down": (pair[0][:2], pair[1][:, :2])}
    )
    made.origin = replace(made.origin, base_model="org/base")
    made.describe(base_fingerprint="f1ce")
    made.save(store.folder / "poet")
    found = store.find("poet")
    assert (found.name, found.version, found.path) == ("poet", 0, store.folder / "poet")
    facts = found.facts
    assert (facts.r, facts.lora_alpha, facts.targets) == (4, 8, ("down", "up"))
    assert facts.nbytes == made.nbytes
    assert (facts.base_model, facts.base_fingerprint) == ("org/base", "f1ce")
    files = [found.path / file for file in ("adapter_config.json", "adapter_model.safetensors")]
    assert found.created == max(file.stat().st_mtime_ns for file in files) / 1e9
    adapter().save(store.folder / "plain")
    assert store.find("plain").facts.base_fingerprint is None


def test_other_files_and_folders_are_ignored(store: AdapterStore) -> None:
    adapter().save(store.folder / "poet")
    for name in (".poet.half", ".versions"):
        shutil.copytree(store.folder / "poet", store.folder / name)
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / "checkpoints" / "00000012").mkdir(parents=True)
    assert store.names() == ["poet"]
    assert store.problems() == {}
    for name in (
        ".poet.half",
        "notes.txt",
        "checkpoints",
        "poet/../poet",
        "../store/poet",
        "",
        "*",
        "poet:x",
        ".versions",
    ):
        with pytest.raises(UnknownAdapterError):
            store.find(name)


def test_a_missing_store(store: AdapterStore, tmp_path: Path) -> None:
    for ask in (store.names, store.latest, store.problems, lambda: store.versions("poet"), lambda: store.find("poet")):
        with pytest.raises(AdapterError, match=str(store.folder)):
            ask()
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match="file"):
        AdapterStore(tmp_path / "file").names()
    store.folder.mkdir()
    assert store.names() == []


def test_a_store_needs_no_torch(store: AdapterStore) -> None:
    store.publish("poet", adapter())
    adapter().save(store.folder / "plain")
    code = f"""
import sys
from loradeck.backends.folder import remove_adapter
from loradeck.store import AdapterStore
store = AdapterStore({str(store.folder)!r})
assert [each.sha256() for each in store.latest()], store.problems()
store.remove("poet")
print([name for name in ("torch", "transformers") if name in sys.modules], store.names())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[] ['plain']\n", "")


# ---- versions


def test_publishing_makes_versions(store: AdapterStore) -> None:
    for number in (1, 2, 3):
        made = store.publish("poet", adapter(number))
        assert (made.name, made.version, made.spec) == ("poet", number, f"poet@{number}")
        assert made == store.find("poet") == store.find("poet@latest") == store.find(made.spec)
    assert store.versions("poet") == [1, 2, 3]
    assert store.names() == ["poet"]
    assert [store.find(f"poet@{n}").facts.r for n in (1, 2, 3)] == [1, 2, 3]
    assert visible(store.folder) == {"poet@1", "poet@2", "poet@3"}


def test_versions_sort_as_numbers(store: AdapterStore, source: Path) -> None:
    for number in (2, 9, 10):
        shutil.copytree(source, store.folder / f"poet@{number}")
    assert store.versions("poet") == [2, 9, 10]
    assert store.publish("poet", source).version == 11


def test_publishing_beside_the_folder_of_a_training_run(store: AdapterStore) -> None:
    adapter(2).save(store.folder / "poet")
    assert store.publish("poet", store.folder / "poet").version == 1
    adapter(3).save(store.folder / "poet")  # trained again: only `publish` makes it the latest
    assert store.versions("poet") == [0, 1]
    assert [store.find(spec).facts.r for spec in ("poet", "poet@0", "poet@1")] == [2, 3, 2]


def test_a_name_that_is_the_beginning_of_another(store: AdapterStore, source: Path) -> None:
    for name in ("poet", "poet2", "poe", "poet-2"):
        store.publish(name, source)
    assert store.publish("poet", source).version == 2
    assert store.versions("poe") == store.versions("poet2") == [1]


@pytest.mark.parametrize(
    "spec", ["poet@2", "poet@", "poet@01", "poet@-1", "poet@1@1", "poet@x", "poet@¹", "poet@0", "poet@" + "9" * 5000]
)
def test_an_unknown_version(store: AdapterStore, source: Path, spec: str) -> None:
    store.publish("poet", source)
    with pytest.raises(UnknownAdapterError, match="'poet' has no version") as caught:
        store.find(spec)
    assert "1" in caught.value.hint
    assert len(str(caught.value)) < 200


def test_an_unknown_name(store: AdapterStore, source: Path) -> None:
    store.publish("poet", source)
    for ask in (store.find, store.versions, store.remove, lambda name: store.prune(name, keep=1)):
        with pytest.raises(UnknownAdapterError, match="'poett'") as caught:
            ask("poett")
        assert "poet" in caught.value.hint


# ---- publish


def test_only_the_adapters_own_files_are_copied(store: AdapterStore, source: Path) -> None:
    made = store.publish("poet", source)
    own = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in made.path.iterdir()} == own
    assert all((made.path / name).read_bytes() == (source / name).read_bytes() for name in own)
    assert store.publish("poet", str(source)).sha256() == made.sha256()
    (source / "README.md").unlink()
    assert {path.name for path in store.publish("poet", source).path.iterdir()} == own - {"README.md"}


def test_a_tokenizer_beside_an_adapter_is_published_and_removed_with_it(store: AdapterStore, source: Path) -> None:
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names:
        (source / name).write_text("{}")
    (source / "trainer_state.json").write_text("{}")
    made = store.publish("poet", source)
    assert names < {path.name for path in made.path.iterdir()}
    assert not (made.path / "trainer_state.json").exists()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    later = store.publish("poet", source)
    assert (later != made, later.sha256() == made.sha256()) == (True, True)
    assert not later.equals(made)
    loaded = Adapter.load(later.path)
    again = store.publish("poet", loaded)
    assert all((again.path / name).read_bytes() == (later.path / name).read_bytes() for name in names)
    store.remove("poet")
    assert visible(store.folder) == set()
    saved = Adapter.load(loaded.save(source.parent / "saved"))  # the tensors are not lost with the tokenizer
    assert (saved.config.r, saved.tokenizer_files.names) == (2, frozenset())
    (source / "config.json").write_text("{}")  # the folder is a model's too
    remove_adapter(source)
    assert names < {path.name for path in source.iterdir()}
    assert not (source / "adapter_config.json").exists()


def test_shards_are_published(store: AdapterStore, source: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = list(load_file(source / "adapter_model.safetensors").items())
    (source / "adapter_model.safetensors").unlink()
    names = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, part in zip(names, (tensors[:2], tensors[2:]), strict=True):
        save_file(dict(part), source / name)
    table = {key: name for name, part in zip(names, (tensors[:2], tensors[2:]), strict=True) for key, _ in part}
    (source / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    made = store.publish("poet", source)
    assert digest(Adapter.load(made.path)) == digest(adapter(2))
    first = made.sha256()
    save_file({key: tensor + 1 for key, tensor in tensors[2:]}, source / names[1])
    assert store.publish("poet", source).sha256() != first


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_a_published_version_is_loaded_by_a_bank_and_by_peft(
    store: AdapterStore, source: Path, tiny: LlamaForCausalLM
) -> None:
    ids = torch.arange(3, 13)[None]
    for _ in range(3):
        store.publish("poet", source)
    bank = Bank(tiny)
    assert bank.load(store.find("poet@3").path, "poet") == "poet"
    with bank.route("poet"):
        ours = tiny(ids).logits
    base = tiny(ids).logits
    bank.detach()
    peft = PeftModel.from_pretrained(tiny, str(store.find("poet@3").path))
    torch.testing.assert_close(peft(ids).logits, ours, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 0.1


def test_an_adapter_with_a_copy_of_a_weight_of_the_base_is_published(store: AdapterStore, source: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.randn(260, 64)
    save_file(tensors, source / "adapter_model.safetensors")
    assert store.publish("poet", source).version == 1


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def dora(folder: Path) -> None:
    table = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**table, "use_dora": True}))


def nan(folder: Path) -> None:
    """Damage that no header shows."""
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\xff" * 4)


@pytest.mark.parametrize(
    ("damage", "error", "what"),
    [
        (cut, AdapterError, "adapter_model.safetensors is damaged"),
        (dora, UnsupportedError, "use_dora"),
        (nan, AdapterError, "NaN"),
        (shutil.rmtree, AdapterError, "not a folder"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_not_published(
    store: AdapterStore, source: Path, damage: Callable[[Path], None], error: type[AdapterError], what: str
) -> None:
    store.publish("poet", source)
    damage(source)
    with pytest.raises(error, match=what) as caught:
        store.publish("poet", source)
    assert str(source) in str(caught.value)
    assert store.versions("poet") == [1]
    assert visible(store.folder) == {"poet@1"}


def test_an_adapter_that_went_nan_is_not_published(store: AdapterStore) -> None:
    broken = adapter()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(AdapterError, match="NaN"):
        store.publish("poet", broken)
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "a@1", "a*b", "a+b", "a:b", "a,b", " a", ".a", "a\n", "a\0", "x" * 129],
)
def test_invalid_names(store: AdapterStore, source: Path, name: str) -> None:
    with pytest.raises(AdapterNameError):
        store.publish(name, source)
    assert not store.folder.exists()


def test_a_name_too_long_for_the_file_system(store: AdapterStore, source: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be changed"):
        store.publish("é" * 128, source)
    assert store.names() == []


def test_a_publish_that_fails_gives_its_number_back(
    store: AdapterStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(AdapterError, match="No space left"):
            store.publish("poet", source)
    assert store.names() == []
    assert store.publish("poet", source).version == 1


def test_a_source_that_changes_while_it_is_read_is_not_published(
    store: AdapterStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def late(start: Path, target: Path) -> None:
        if start.name == "adapter_config.json":
            adapter(5).save(source)
        copy(start, target)

    monkeypatch.setattr(shutil, "copyfile", late)
    with pytest.raises(AdapterError, match="changed while it was read"):
        store.publish("poet", source)
    assert store.names() == []


# ---- identity


def test_sha256_is_of_the_files(store: AdapterStore, source: Path) -> None:
    made = store.publish("poet", source)
    lines = "".join(
        f"{hashlib.sha256((source / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert made.sha256() == hashlib.sha256(lines.encode()).hexdigest()
    assert made.recorded_sha256 == store.find("poet").recorded_sha256 == made.sha256()
    adapter(2).save(store.folder / "plain")
    plain = store.find("plain")
    assert plain.recorded_sha256 is None
    assert plain.sha256() == made.sha256()
    assert store.publish("poet", adapter(3)).sha256() != made.sha256()
    shutil.rmtree(store.folder / ".versions")
    assert (store.find("poet@1").recorded_sha256, store.find("poet@1").sha256()) == (None, made.sha256())


def test_the_identity_covers_alpha_but_not_the_card(store: AdapterStore, source: Path) -> None:
    first = store.publish("poet", source).sha256()
    (source / "README.md").write_text("Another card.")
    assert store.publish("poet", source).sha256() == first
    table = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**table, "lora_alpha": 1}))
    assert store.publish("poet", source).sha256() != first


@pytest.mark.parametrize("record", [b"", b"{", b'{"sha256": "x", "files": []}', b"[" * 100_000, b"\xff"])
def test_an_unreadable_record_only_costs_time(store: AdapterStore, source: Path, record: bytes) -> None:
    made = store.publish("poet", source)
    (store.folder / ".versions" / "poet@1.json").write_bytes(record)
    assert store.find("poet").recorded_sha256 is None
    assert store.find("poet").sha256() == made.sha256()


def test_a_version_changed_by_hand_has_another_identity(store: AdapterStore, source: Path) -> None:
    made = store.publish("poet", source)
    file = made.path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")  # of the same size
    with pytest.raises(AdapterError, match="has changed"):
        made.sha256()
    assert store.find("poet") != made
    assert store.find("poet").sha256() != made.recorded_sha256


@pytest.mark.parametrize("settled", [False, True])
def test_a_folder_that_is_trained_again_is_noticed(
    store: AdapterStore, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settled:  # as if a second had passed, so headers are cached
        monkeypatch.setattr("loradeck.disk.SETTLED", -(10**9))
    adapter(2).save(store.folder / "poet")
    found = store.find("poet")
    first = found.sha256()
    assert found == store.find("poet")
    adapter(3).save(store.folder / "poet")
    with pytest.raises(AdapterError, match="has changed"):
        found.sha256()
    assert store.find("poet") != found
    assert store.find("poet").facts.r == 3
    assert store.find("poet").sha256() != first


def test_a_change_with_the_old_mtime_is_noticed(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loradeck.disk.SETTLED", -(10**9))
    file = adapter().save(store.folder / "poet") / "adapter_model.safetensors"
    found, times = store.find("poet"), file.stat()
    first = found.sha256()
    time.sleep(0.05)  # some ticks of the file system's clock
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.find("poet").created == found.created
    assert store.find("poet").sha256() != first


def test_headers_are_read_once_while_the_files_stay_the_same(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loradeck.disk.SETTLED", -(10**9))
    adapter().save(store.folder / "poet")
    first = store.find("poet")
    digest = first.sha256()
    monkeypatch.setattr("loradeck.stored.read_folder", lambda path: pytest.fail("read again"))
    assert store.find("poet") == first
    assert store.find("poet").sha256() == digest


def test_files_written_just_now_are_not_cached(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loradeck.disk.SETTLED", 10**15)  # just now: in the last eleven days
    adapter().save(store.folder / "poet")
    store.find("poet")

    def read(path: Path) -> None:
        raise AdapterError("read again")

    monkeypatch.setattr("loradeck.stored.read_folder", read)
    with pytest.raises(AdapterError, match="read again"):
        store.find("poet")


def test_a_copied_store_keeps_its_records(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    made = store.publish("poet", source)
    shutil.copytree(store.folder, tmp_path / "copy")  # keeps the times of files, as rsync -a does
    copied = AdapterStore(tmp_path / "copy").find("poet")
    assert copied.recorded_sha256 == made.sha256()
    assert copied.created == made.created


# ---- damage


def test_a_damaged_adapter_is_reported_and_hides_no_other(store: AdapterStore, source: Path) -> None:
    for name in ("poet", "pirate"):
        store.publish(name, source)
    cut(store.publish("poet", source).path)
    dora(shutil.copytree(source, store.folder / "dora"))
    assert store.names() == ["dora", "pirate", "poet"]
    assert [each.spec for each in store.latest()] == ["pirate@1"]
    problems = store.problems()
    assert problems.keys() == {"poet@2", "dora"}
    assert isinstance(problems["dora"], UnsupportedError)
    with pytest.raises(AdapterError, match="is damaged"):
        store.find("poet")  # never an older version instead
    assert store.find("poet@1").facts.r == 2
    store.remove("poet@2")
    assert store.find("poet").version == 1


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_tensors_without_a_configuration_are_a_damaged_adapter(store: AdapterStore, source: Path, name: str) -> None:
    """As a removal leaves them that was killed between the files of a folder with others in it."""
    shutil.copytree(source, store.folder / "poet")
    (store.folder / "poet" / "adapter_config.json").unlink()
    (store.folder / "poet" / "adapter_model.safetensors").rename(store.folder / "poet" / name)
    assert store.names() == ["poet"]
    assert store.problems().keys() == {"poet"}
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        store.find("poet")
    store.remove("poet")
    assert store.names() == []
    assert {path.name for path in (store.folder / "poet").iterdir()} == {"metrics.jsonl", "checkpoints"}


@pytest.mark.parametrize("name", ["a+b", "poet@x", "poet@0", "poet@01", "@1", "a@b@1"])
def test_a_folder_with_an_invalid_name_is_reported(store: AdapterStore, source: Path, name: str) -> None:
    store.publish("poet", source)
    shutil.copytree(source, store.folder / name)
    assert store.names() == ["poet"]
    assert store.versions("poet") == [1]
    assert [each.spec for each in store.latest()] == ["poet@1"]
    assert {key: type(error) for key, error in store.problems().items()} == {name: AdapterNameError}
    with pytest.raises(UnknownAdapterError):
        store.find(name)


@pytest.mark.parametrize(
    ("name", "better"),
    [("a+b", "a-b"), ("team:x", "team-x"), ("x@y", "x-y"), ("a=b", "a-b"), ("a,b", "a-b"), ("x@", "x-"), (" é ", "é")],
)
def test_what_is_skipped_is_told_with_a_name_that_would_do(
    store: AdapterStore, source: Path, name: str, better: str
) -> None:
    shutil.copytree(source, store.folder / name)
    shutil.copytree(source, store.folder / "poet")
    problems = store.problems()
    assert [*problems] == [name]
    assert problems[name].hint == f"Rename the folder, for example to {better!r}."
    (store.folder / name).rename(store.folder / better)
    assert store.problems() == {}
    assert store.names() == sorted([better, "poet"])


def test_a_pipe_in_an_adapters_folder_does_not_block_the_store(store: AdapterStore) -> None:
    (store.folder / "poet").mkdir(parents=True)
    os.mkfifo(store.folder / "poet" / "adapter_config.json")
    assert store.problems().keys() == {"poet"}


# ---- remove and prune


def test_remove_one_version(store: AdapterStore) -> None:
    for r in (1, 2, 3):
        store.publish("poet", adapter(r))
    store.remove("poet@2")
    assert store.versions("poet") == [1, 3]
    store.remove("poet@latest")
    assert store.find("poet").version == 1
    assert visible(store.folder) == {"poet@1"}
    assert store.publish("poet", adapter(9)).version == 4  # 3 would be another adapter under an old name


def test_remove_a_name(store: AdapterStore, source: Path) -> None:
    adapter().save(store.folder / "poet")
    for name in ("poet", "poet", "poet2"):
        store.publish(name, source)
    store.remove("poet")
    assert store.names() == ["poet2"]
    assert visible(store.folder) == {"poet2@1"}
    assert records(store) == ["poet2@1.json", "poet@2.json"]
    assert store.publish("poet", source).version == 3


def test_remove_leaves_other_files(store: AdapterStore, source: Path) -> None:
    shutil.copytree(source, store.folder / "poet")
    store.remove("poet")
    assert store.names() == []
    assert {path.name for path in (store.folder / "poet").iterdir()} == {"metrics.jsonl", "checkpoints"}
    assert visible(store.folder) == {path.name for path in store.folder.iterdir()} == {"poet"}


def test_removing_a_link_leaves_its_target(store: AdapterStore, source: Path) -> None:
    store.folder.mkdir()
    (store.folder / "poet").symlink_to(source)
    assert store.find("poet").facts.r == 2
    store.remove("poet")
    assert store.names() == []
    assert Adapter.load(source).config.r == 2


def test_a_removal_that_stops_halfway_leaves_the_latest(
    store: AdapterStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        store.publish("poet", source)
    rename = Path.rename

    def stop(path: Path, target: Path) -> Path:
        if path.name == "poet@2":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(AdapterError, match="Input/output error"):
        store.remove("poet")
    assert store.versions("poet") == [2, 3]


def test_prune(store: AdapterStore, source: Path) -> None:
    adapter().save(store.folder / "poet")
    for _ in range(4):
        store.publish("poet", source)
    assert store.prune("poet", keep=2) == [1, 2]
    assert store.versions("poet") == [0, 3, 4]  # version 0 was never published, so it stays
    assert store.prune("poet", keep=2) == store.prune("poet", keep=9) == []
    assert records(store) == ["poet@3.json", "poet@4.json"]
    with pytest.raises(ConfigError, match="keep must be at least 1, not 0"):
        store.prune("poet", keep=0)
    assert store.versions("poet") == [0, 3, 4]


# ---- others at the same time

# Publishes one adapter per source and round, each in a process of its own; every round begins together in all of them.
RACE = """
import multiprocessing, os, sys
from loradeck import Adapter
from loradeck.backends.folder import remove_adapter
from loradeck.store import AdapterStore
folder, rounds, *sources = sys.argv[1:]
adapters, store = [Adapter.load(source) for source in sources], AdapterStore(folder)
barrier = multiprocessing.get_context("fork").Barrier(len(adapters), timeout=600)
for adapter in adapters:
    if os.fork() == 0:
        for _ in range(int(rounds)):
            barrier.wait()
            stored = store.publish("poet", adapter)
            os.write(1, f"{stored.version} {stored.facts.r}\\n".encode())
        os._exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in adapters))
"""


@pytest.mark.slow
def test_processes_that_publish_one_name_at_the_same_time_lose_nothing(store: AdapterStore, tmp_path: Path) -> None:
    processes, rounds = 4, 5
    sources = [str(adapter(r, layers=1, width=8).save(tmp_path / f"{r}")) for r in range(1, processes + 1)]
    command = [sys.executable, "-c", RACE, str(store.folder), str(rounds), *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    ranks = dict(map(int, line.split()) for line in done.stdout.splitlines())
    assert sorted(ranks) == store.versions("poet") == list(range(1, processes * rounds + 1))
    assert {number: store.find(f"poet@{number}").facts.r for number in ranks} == ranks
    for first in range(1, processes * rounds, processes):
        assert sorted(ranks[number] for number in range(first, first + processes)) == [1, 2, 3, 4]
    assert len(visible(store.folder)) == processes * rounds


@pytest.fixture
def publisher(store: AdapterStore) -> Iterator[threading.Thread]:
    """Publish and remove the old in a thread until the test ends."""
    end = threading.Event()
    made = adapter(layers=1, width=8)
    store.publish("poet", made)

    def run() -> None:
        while not end.is_set():
            store.publish("poet", made)
            store.prune("poet", keep=1)

    thread = threading.Thread(target=run)
    thread.start()
    yield thread
    end.set()
    thread.join()


def test_an_adapter_is_always_found_while_others_publish_and_prune(
    store: AdapterStore, publisher: threading.Thread
) -> None:
    seen: list[Stored] = []
    while len({found.version for found in seen}) < 10:
        seen.append(store.find("poet"))
        assert store.names() == ["poet"]
        assert store.problems() == {}
    assert publisher.is_alive()
    versions = [found.version for found in seen]
    assert versions == sorted(versions)


@pytest.mark.parametrize("how", ["find", "problems"])
def test_a_version_removed_between_listing_and_reading(
    store: AdapterStore, source: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for _ in range(2):
        store.publish("poet", source)

    def late(*question: Any) -> Stored:
        if question[1] == 2:
            shutil.rmtree(question[2])
        return read_stored(*question)

    monkeypatch.setattr("loradeck.backends.folder.read_stored", late)
    if how == "find":
        assert store.find("poet").version == 1
    else:
        assert store.problems() == {}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (lambda store: store.find("poet").version, 2),
        (lambda store: store.versions("poet"), [2]),
        (AdapterStore.names, ["poet"]),
        (lambda store: [adapter.version for adapter in store.latest()], [2]),
        (AdapterStore.problems, {}),
    ],
    ids=["find", "versions", "names", "latest", "problems"],
)
def test_a_version_replaced_during_a_query(
    store: AdapterStore,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    query: Callable[[AdapterStore], object],
    expected: object,
) -> None:
    """Between listing the folder and looking into what was listed, another process publishes and prunes."""
    store.publish("poet", source)
    replaced = threading.Event()

    def late(folder: Path) -> bool:
        if not replaced.is_set():
            replaced.set()
            store.publish("poet", source)
            store.prune("poet", keep=1)
        return is_adapter(folder)

    monkeypatch.setattr("loradeck.backends.folder.is_adapter", late)
    assert query(store) == expected


# For each line "step action" it reads, forks a process that does the action, and is killed before the step-th time
# that it asks the system for something in the store; tells how the process ended. Torch is imported once.
STEPS = """
import os, signal, sys
from loradeck import Adapter
from loradeck.backends.folder import remove_adapter
from loradeck.store import AdapterStore
folder, source = sys.argv[1:]
adapter, store = Adapter.load(source), AdapterStore(folder)
actions = {
    "folder": lambda: store.publish("poet", source),
    "adapter": lambda: store.publish("poet", adapter),
    "remove": lambda: store.remove("poet@latest"),
    "prune": lambda: store.prune("poet", keep=1),
}
for line in sys.stdin:
    left, action = line.split()
    left = int(left)
    def kill(event, given):
        global left
        paths = [os.fsdecode(each) for each in given if isinstance(each, (str, bytes, os.PathLike))]
        if event in ("os.remove", "os.rmdir") or any(folder in path for path in paths):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if child == 0:
        sys.addaudithook(kill)
        actions[action]()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_kill_at_every_step(store: AdapterStore, tmp_path: Path) -> None:
    source = adapter(2).save(tmp_path / "source")
    identity = store.publish("other", source).sha256()

    def there() -> list[int]:
        return store.versions("poet") if "poet" in store.names() else []

    command = [sys.executable, "-c", STEPS, str(store.folder), str(source)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        highest = 0
        for action in ("folder", "adapter", "remove", "prune"):
            seen: set[tuple[int, bool]] = set()
            for step in range(1000):
                while len(there()) < 2:
                    made = store.publish("poet", source).version
                    assert made > highest  # no number twice, not even that of a version whose removal was killed
                    highest = made
                before = there()
                process.stdin.write(f"{step} {action}\n")
                process.stdin.flush()
                status = int(process.stdout.readline())
                after = there()
                if action in ("folder", "adapter"):
                    new = {*after} - {*before}
                    assert after[: len(before)] == before
                    assert len(new) <= 1
                    assert not new or min(new) > highest
                    highest = max(highest, *after)
                else:
                    gone = {*before} - {*after}
                    assert gone in (set(), {before[-1]}) if action == "remove" else gone <= {*before[:-1]}
                assert store.problems() == {}  # what is there is whole
                assert {store.find(f"poet@{number}").sha256() for number in after} == {identity}
                seen.add((status, before != after))
                if status == 0:
                    break
                store.prune("poet", keep=2)
            # killed before it showed and after, and at last not killed
            assert seen == {(-signal.SIGKILL, False), (-signal.SIGKILL, True), (0, True)}
        process.stdin.close()
    assert store.publish("poet", source).version > highest
