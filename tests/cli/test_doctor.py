import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from loradeck.base import blocked, prepacked, quantised
from loradeck.cli import doctor
from loradeck.ops import cpu, dispatch


def test_it_reports_the_installation(run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu.why_not_available()  # compiles, if no test did before, into the cache of all tests; so does the next line
    [*map(blocked.why_not_blocked, blocked.TOLERANCE)]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x").write_bytes(b"0" * 1500)
    monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    ran = run("doctor")
    assert ran.code == 0
    facts = dict(re.split("  +", line, maxsplit=1) for line in ran.out.splitlines())
    assert facts["torch"] == version("torch")
    assert facts["threads"].startswith(f"{torch.get_num_threads()} on ")
    assert facts["cache"].endswith("cache, 1.5 kB")
    assert json.loads(run("doctor", "--json").out) == {"sound": True, **facts}


def test_it_reports_the_kernels(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "why_not_packed", lambda dtype: "slow" if dtype == torch.float32 else None)
    monkeypatch.setattr(quantised, "why_not_quantised", lambda: "no compiler")
    monkeypatch.setattr(cpu, "why_not_available", lambda: "no compiler")
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: "no Triton")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    facts = json.loads(run("doctor", "--json").out)
    assert facts["packed weights"] == "not in float32 (slow); in bfloat16"
    assert facts["quantised weights"] == "no compiler"
    assert facts["adapters on a CPU"] == "portable (no compiler)"
    assert facts["adapters on a GPU"] == "portable (no Triton)"


def test_it_says_where_the_compiled_code_comes_from(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "why_not_blocked", lambda dtype: "is missing" if dtype == torch.float16 else None)
    monkeypatch.setattr(blocked, "multiplies_halves", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(blocked, "origin", lambda dtype: "prebuilt")
    monkeypatch.setattr(cpu, "why_not_available", lambda: None)
    monkeypatch.setattr(cpu, "origin", lambda: "prebuilt")
    facts = json.loads(run("doctor", "--json").out)
    step = "of float32 weights, in float32; of bfloat16 weights, in bfloat16; not of float16 weights: it is missing"
    assert facts["compiled step"] == f"{step}; prebuilt"
    assert facts["adapters on a CPU"] == "in C, prebuilt"


def test_without_a_gpu_adapters_have_no_gpu(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert json.loads(run("doctor", "--json").out)["adapters on a GPU"] == "no GPU"


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
    assert "pip install 'loradeck[gguf]' adds gguf" in facts["extras"]


@pytest.mark.parametrize(("offline", "message"), [(True, "the hub is off"), (False, "on the hub")])
def test_without_the_package_smollm2_is_the_hub_s(monkeypatch: pytest.MonkeyPatch, offline: bool, message: str) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert message in doctor._smollm2()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/somewhere")
    assert "downloaded from the hub" in doctor._smollm2()
