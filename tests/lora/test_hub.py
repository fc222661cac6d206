"""Adapters on the hub: a stand-in for its HTTP API, and the hub's own client."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import run

import huggingface_hub
import pytest
from tests.hub_server import LARGE, TOKEN, Hub, hub_server
from transformers import LlamaForCausalLM

from loradeck.cli import main
from loradeck.errors import AdapterError
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.lora.hub import download, has_adapter, local, upload
from loradeck.lora.manifest import read_folder
from loradeck.store import AdapterStore

# The hub's client itself uploads in a way that its HTTP library will drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def use(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Point the hub's client at a server."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as (hub, address):
        use(monkeypatch, address, tmp_path / "cache")
        yield hub


@pytest.fixture
def folder(tiny: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A trained adapter's folder; its tensors are a large file of the hub."""
    bank = Bank(tiny)
    bank.add("poet", LoraConfig(r=2, target_modules="attention"))
    path = bank.save("poet", tmp_path / "poet")
    bank.detach()
    assert (path / "adapter_model.safetensors").stat().st_size > LARGE > (path / "adapter_config.json").stat().st_size
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CODE = {"modeling_evil.py": b"1/0", "adapter_model.bin": b"a pickle", "optimizer.pt": b"a pickle", "notes.txt": b"x"}


def test_a_bank_loads_a_hub_id(hub: Hub, folder: Path, tiny: LlamaForCausalLM, tmp_path: Path) -> None:
    repository = hub.add("owner/poet", files_of(folder) | CODE)
    bank = Bank(tiny)
    assert bank.load("owner/poet") == "poet"
    assert bank["poet"].sites == read_folder(folder).sites
    (snapshot,) = (tmp_path / "cache" / "models--owner--poet" / "snapshots").iterdir()
    assert snapshot.name == repository.revisions["main"]
    assert {path.name for path in snapshot.iterdir()} == set(files_of(folder))
    assert not any("evil" in line or ".bin" in line or ".pt" in line for line in hub.asked)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, folder: Path, tiny: LlamaForCausalLM) -> None:
    repository = hub.add("owner/poet", files_of(folder))
    first = repository.revisions["main"]
    repository.revisions["v1"] = first
    second = repository.commit(files_of(folder) | {"README.md": b"# Another"})
    assert local("owner/poet").name == second
    assert local("owner/poet@v1").name == first
    assert local(f"owner/poet@{first}").name == first
    with pytest.raises(AdapterError, match=r"owner/poet has no such revision\nGive a branch, a tag or a commit"):
        local("owner/poet@v9")


def test_what_is_there_is_not_downloaded_again(hub: Hub, folder: Path) -> None:
    hub.add("owner/poet", files_of(folder))
    local("owner/poet")
    hub.asked.clear()
    local("owner/poet")
    assert not any("/resolve/" in line for line in hub.asked)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_with_another_hash_is_refused_and_not_kept(hub: Hub, folder: Path, name: str) -> None:
    hub.add("owner/poet", files_of(folder))
    hub.damaged = {name}
    for _ in range(2):  # the cache does not give it either
        with pytest.raises(AdapterError, match=rf"{name} of owner/poet is not what the hub states: its hash is"):
            local("owner/poet")
    hub.damaged = set()
    assert files_of(local("owner/poet")) == files_of(folder)


def test_a_file_that_is_damaged_in_the_cache_is_noticed(hub: Hub, folder: Path) -> None:
    hub.add("owner/poet", files_of(folder))
    tensors = local("owner/poet") / "adapter_model.safetensors"
    tensors.resolve().write_bytes(bytes(tensors.stat().st_size))
    with pytest.raises(AdapterError, match="is not what the hub states"):
        local("owner/poet")
    assert files_of(local("owner/poet")) == files_of(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "model.safetensors": b""}, "owner/x is a model, not an adapter"),
        ({"README.md": b""}, "owner/x holds no adapter_config.json"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b""}, "only a pickle\nPickles are not downloaded"),
        ({"a/adapter_config.json": b"{}", "b/adapter_config.json": b"{}"}, "but in the folders a, b\nDownload it with"),
    ],
)
def test_a_repository_without_an_adapter_says_what_it_is(hub: Hub, files: dict[str, bytes], message: str) -> None:
    hub.add("owner/x", files)
    with pytest.raises(AdapterError, match=message):
        local("owner/x")
    assert not any("/resolve/" in line for line in hub.asked)


def test_a_large_adapter_is_refused_before_it_is_downloaded(hub: Hub, folder: Path) -> None:
    hub.add("owner/poet", files_of(folder))
    with pytest.raises(AdapterError, match=r"owner/poet has \d+ bytes, more than the limit of 1000"):
        download("owner/poet", most=1000)
    assert not any("/resolve/" in line for line in hub.asked)


def test_the_token_opens_what_is_private_or_gated(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("owner/private", files_of(folder), private=True)
    hub.add("owner/gated", files_of(folder), gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        AdapterError, match=r"has no adapter owner/private, or does not show it to you\n.*hf auth login"
    ):
        local("owner/private")
    with pytest.raises(AdapterError, match=r"owner/gated is gated\nAccept its terms on its page, and log in"):
        local("owner/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in "private", "gated":
        assert files_of(local(f"owner/{name}")) == files_of(folder)


def test_without_the_hub_the_cache_is_used(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("owner/poet", files_of(folder))
    path = local("owner/poet")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        use(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "cache")
    assert local("owner/poet") == path
    assert "owner/poet is that of the cache: http://127.0.0.1:" in caplog.text
    with pytest.raises(
        AdapterError, match=r"owner/other is not in the cache, and http://127.0.0.1:.* cannot be reached"
    ):
        local("owner/other")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local("owner/poet") == path
    with pytest.raises(AdapterError, match="owner/other is not in the cache, and HF_HUB_OFFLINE is set"):
        local("owner/other")


def test_a_path_is_not_taken_for_a_hub_id(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: LlamaForCausalLM
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    bank = Bank(tiny)
    for wrong in "adapters/peot", "peot", "a/b/c", "a\0b/c":
        with pytest.raises(AdapterError):
            bank.load(wrong)
    assert hub.asked == []


@pytest.mark.parametrize("path", ["./owner/poet", "../owner/poet", "~/owner/poet", "/owner/poet", Path("owner/poet")])
def test_an_explicit_path_is_never_a_hub_id(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: LlamaForCausalLM, path: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("owner/poet", files_of(folder))
    bank = Bank(tiny)
    with pytest.raises(AdapterError, match="owner/poet is not a folder"):
        bank.load(path)
    for arguments in ["show"], ["diff", str(folder)], ["push", "me/poet"], ["publish", "adapters/poet"]:
        assert main([arguments[0], str(path) if isinstance(path, str) else "./owner/poet", *arguments[1:]]) == 2
    assert hub.asked == []


# ---- the command line


@pytest.mark.parametrize(
    "command",
    [
        "show owner/poet", "diff owner/poet poet", "publish owner/poet adapters/bard", "push owner/poet me/poet",
        "generate bpe Hi -a owner/poet -a owner/poet*0.5 --max-new-tokens 2 Ho", "merge bpe owner/poet -o merged",
        "eval bpe data.csv --split train --adapter owner/poet --samples 0", "convert owner/poet -o mlx --to mlx",
        "export bpe --adapter owner/poet -o merged.gguf", "export owner/poet -o poet.gguf --base bpe",
        "train bpe data.csv -o child --from owner/poet --max-steps 1",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("bpe_folder")
def test_a_command_takes_a_hub_id_and_asks_for_it_once(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("owner/poet", files_of(folder))
    (tmp_path / "data.csv").write_text("prompt,completion\n" + "Hi,Ahoy!\n" * 4)
    assert main(command.split()) == 0
    assert hub.asked.count("GET /api/models/owner/poet") == 1


def test_training_that_goes_on_from_an_adapter_of_the_hub_keeps_its_commit(
    hub: Hub, folder: Path, bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    repository = hub.add("owner/poet", files_of(folder))
    (tmp_path / "data.csv").write_text("prompt,completion\n" + "Hi,Ahoy!\n" * 4)
    command = ["train", str(bpe_folder), "data.csv", "--from", "owner/poet", "--output"]
    assert main([*command, "child", "--max-steps", "1"]) == 0
    name = f"owner/poet@{repository.revisions['main']}"
    assert read_folder(Path("child")).origin.provenance["parent"] == name
    assert f'from = "{name}"' in Path("child/run.toml").read_text()
    assert f"| goes on from | {name} |" in Path("child/README.md").read_text()
    assert main([*command, "child", "--max-steps", "2", "--resume"]) == 0
    repository.commit(files_of(folder) | {"adapter_model.safetensors": b"another"})
    assert main(["train", "--output", "child", "--max-steps", "3", "--resume"]) == 0
    assert read_folder(Path("child")).origin.provenance["steps"] == "3"
    assert main([*command, "child", "--max-steps", "4", "--resume"]) == 2  # the branch has another adapter now


def test_only_an_adapter_of_the_hub_is_exported_as_one(
    hub: Hub, folder: Path, bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("owner/poet", files_of(folder))
    hub.add("owner/model", files_of(bpe_folder))
    assert main(["export", "owner/model", "-o", "model.gguf"]) == 0
    assert main(["export", "owner/poet", "-o", "poet.gguf", "--base", "owner/model"]) == 0
    with socket.create_server(("127.0.0.1", 0)) as closed:
        use(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "cache")
    assert has_adapter("owner/poet")
    for other in "owner/model", "owner/nothing", "./owner/poet", "poet", "a\0b/c":
        assert not has_adapter(other)


def test_an_adapter_of_the_hub_is_shown_and_refused_by_its_name(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    repository = hub.add("owner/poet", files_of(folder))
    name = f"owner/poet@{repository.revisions['main']}"
    assert main(["show", "owner/poet"]) == 0
    assert capsys.readouterr().out.startswith(f"{name}\n")
    name = f"owner/poet@{repository.commit(files_of(folder) | {'adapter_model.safetensors': b'broken'})}"
    assert main(["show", "owner/poet"]) == 2
    assert f"loradeck: {name}/adapter_model.safetensors is not a safetensors file" in capsys.readouterr().err


def test_pull_publishes_a_version_once(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    repository = hub.add("owner/poet", files_of(folder))
    assert main(["pull", "owner/poet"]) == 0
    assert capsys.readouterr().out.endswith(
        f"of owner/poet at {repository.revisions['main'][:12]}, now the latest version\n"
    )
    assert main(["pull", "owner/poet"]) == 0
    assert capsys.readouterr().out.endswith("the latest version already\n")
    store = AdapterStore(tmp_path / "adapters")
    assert store.versions("poet") == [1]
    assert main(["pull", "owner/poet@main", "adapters/bard"]) == 0
    assert store.versions("bard") == [1]
    assert main(["show", "owner/poet"]) == 0
    assert "owner/poet" in "\n".join(hub.asked)


def test_push_then_pull_is_the_same_adapter(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "optimizer.pt").write_bytes(b"not to be uploaded")
    assert main(["push", str(folder), "me/poet", "--message", "The first"]) == 0
    repository = hub.repositories["me/poet"]
    assert repository.private
    assert repository.commits[repository.revisions["main"]] == {
        ".gitattributes": b"",
        **{name: content for name, content in files_of(folder).items() if name != "optimizer.pt"},
    }
    assert main(["pull", "me/poet", "adapters/copy"]) == 0
    version = AdapterStore(tmp_path / "adapters").find("copy").path
    for name in "adapter_config.json", "adapter_model.safetensors":
        assert (version / name).read_bytes() == (folder / name).read_bytes()
    assert main(["push", str(folder), "me/poet@draft", "--public"]) == 0
    assert repository.private
    draft, latest = (repository.commits[repository.revisions[name]] for name in ("draft", "main"))
    assert draft == latest


def test_a_push_removes_the_tensors_of_an_older_adapter(hub: Hub, folder: Path) -> None:
    shards = {"adapter_model-00001-of-00001.safetensors": b"x" * 2000, "adapter_model.safetensors.index.json": b"{}"}
    repository = hub.add("me/poet", shards | {"LICENSE": b"mine"})
    upload(folder, "me/poet")
    files = repository.commits[repository.revisions["main"]]
    assert files.keys() == files_of(folder).keys() | {"LICENSE"}


def test_a_push_needs_a_token_and_a_whole_adapter(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(folder), "me/poet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("loradeck: me/poet: http://")
    assert error.endswith("\nLog in with a token that may do so: hf auth login\n")
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    hub.asked.clear()
    assert main(["push", str(folder), "me/poet"]) == 2
    assert hub.asked == []


def test_the_environment_is_the_hub_clients(folder: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, of a process of its own."""
    with hub_server() as (hub, address):
        hub.add("owner/poet", files_of(folder), private=True)
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": ":".join(sys.path),
            "HOME": str(tmp_path),
        }
        command = [sys.executable, "-m", "loradeck", "pull", "owner/poet", "adapters/poet", "--json"]
        first = run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert first.returncode == 0, first.stderr
        hub.asked.clear()
        offline = environment | {"HF_HUB_OFFLINE": "1"}
        second = run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, check=False)
        assert second.returncode == 0, second.stderr
        assert '"new": true' in first.stdout
        assert '"new": false' in second.stdout
        assert hub.asked == []
