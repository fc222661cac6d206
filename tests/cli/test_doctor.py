import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from loradeck.base import prepacked, quantised
from loradeck.cli import doctor
from loradeck.ops import cpu, dispatch


def test_it_says_what_is_here(run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x").write_bytes(b"0" * 1500)
    monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "cache"))
    ran = run("doctor")
    assert ran.code == 0
    facts = dict(line.split(None, 1) for line in ran.out.splitlines())
    assert facts["torch"] == version("torch")
    assert facts["cpu"].startswith(f"{torch.get_num_threads()} threads")
    assert facts["cache"].endswith("cache, 1.5 kB")
    assert json.loads(run("doctor", "--json").out) == {"sound": True, **facts}


def test_it_says_which_kernels_there_are(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "packing", lambda dtype: "is slower here" if dtype == torch.float32 else "")
    monkeypatch.setattr(quantised, "int8_product", lambda: "")
    monkeypatch.setattr(cpu, "why_not_available", lambda: "needs a compiler")
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: "is for GPUs")
    facts = json.loads(run("doctor", "--json").out)
    assert (
        facts["kernels"]
        == "packed float32 is slower here; packed bfloat16; int8; native needs a compiler; triton is for GPUs"
    )


def test_a_broken_torch_is_one_line_of_it(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ran = run("doctor", "--json")
    assert ran.code == 1
    facts = json.loads(ran.out)
    assert facts["sound"] is False
    assert facts["cpu"].startswith("broken: ")
    assert facts["transformers"] == version("transformers")


def test_what_is_missing_is_named_with_its_remedy(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        if name in ("gguf", "torch"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    ran = run("doctor", "--json")
    facts = json.loads(ran.out)
    assert ran.code == 1
    assert facts["torch"] == doctor.MISSING
    assert "gguf lacks gguf: pip install 'loradeck[gguf]'" in facts["extras"]


@pytest.mark.parametrize(("offline", "said"), [(True, "the hub is switched off"), (False, "on the hub")])
def test_without_the_package_smollm2_is_the_hub_s(monkeypatch: pytest.MonkeyPatch, offline: bool, said: str) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert said in doctor._smollm2()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/somewhere")
    assert "kept on this machine" in doctor._smollm2()
