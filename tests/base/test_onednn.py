"""Compiled kernels take a bounded amount of memory."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loradeck.base import onednn
from loradeck.base.load import Base
from loradeck.base.onednn import VARIABLES, cap_kernel_cache
from loradeck.base.prepacked import why_not_packed

# Bytes that a packed layer has allocated after 400 batch sizes, counted by glibc.
ALLOCATED = """
import ctypes, sys, torch
from loradeck.base.onednn import cap_kernel_cache
from loradeck.base.prepacked import PackedLinear, pack
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used free g".split()]
libc = ctypes.CDLL(None); libc.mallinfo2.restype = Info
if sys.argv[1] == "cap": cap_kernel_cache()
layer = torch.nn.Linear(300, 300).requires_grad_(False); pack(layer); assert isinstance(layer, PackedLinear)
before = libc.mallinfo2().used
with torch.inference_mode():
    for rows in range(1, 401): layer(torch.zeros(rows, 300))
print(libc.mallinfo2().used - before)
"""


def allocated(mode: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    result = subprocess.run([sys.executable, "-c", ALLOCATED, mode], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(why_not_packed(torch.float32) is not None, reason=f"packed: {why_not_packed(torch.float32)}")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_a_cap_halves_the_memory_of_compiled_kernels() -> None:
    assert allocated("cap") < allocated("default") / 2


def test_variables_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {VARIABLES[0]: "7"}
    monkeypatch.setattr(onednn.os, "environ", environment)
    cap_kernel_cache(99)
    assert environment == {VARIABLES[0]: "7", VARIABLES[1]: "99"}


def test_loading_a_base_sets_no_variable(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    Base.load(tiny_folder, device="cpu")
    assert not set(VARIABLES) & set(os.environ)
