"""benchmarks/gpu.py works: small and on the CPU here, and says so where there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.models import SHAPES
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_it_runs_on_a_cpu_and_writes_nothing() -> None:
    results = ROOT / "benchmarks" / "results" / "gpu.json"
    before = results.read_bytes() if results.exists() else None
    done = run("--device", "cpu", "--shape", "tiny", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    for part in ("operation", "ways", "decode", "load", "train"):
        assert f"\n{part} tiny\n" in done.stdout
    assert "written" not in done.stdout
    assert (results.read_bytes() if results.exists() else None) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"benchmarks.gpu: torch {torch.__version__} finds no CUDA device here; nothing was measured.\n"
    )


@pytest.mark.parametrize(("shape", "count"), [("Llama-3.2-1B", 1_235_814_400), ("Llama-3.1-8B", 8_030_261_248)])
def test_its_shapes_are_the_real_ones(shape: str, count: int) -> None:
    """As many parameters as the models have on the hub; the frequencies of their positions are stretched."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape]())
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.config.rope_parameters["rope_type"] == "llama3"
