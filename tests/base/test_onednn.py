"""A base that meets many numbers of rows does not take more and more memory."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loradeck.base import onednn
from loradeck.base.onednn import FEW, MANY, SETTINGS, keep
from loradeck.base.prepacked import packing

# What a packed layer has taken after 600 numbers of rows, by glibc's own count.
TAKEN = """
import ctypes, sys, torch
from loradeck import Base
from loradeck.base.prepacked import PackedLinear, pack
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used free g".split()]
libc = ctypes.CDLL(None); libc.mallinfo2.restype = Info
Base.load(sys.argv[1], device="cpu", dtype="float32")
layer = torch.nn.Linear(300, 300).requires_grad_(False); pack(layer); assert isinstance(layer, PackedLinear)
begun = libc.mallinfo2().used
with torch.inference_mode():
    for rows in range(1, 601): layer(torch.zeros(rows, 300))
print(libc.mallinfo2().used - begun)
"""


def taken(folder: Path, kept: str | None) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    if kept is not None:
        environment |= dict.fromkeys(SETTINGS, kept)
    command = [sys.executable, "-c", TAKEN, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(bool(packing(torch.float32)), reason=f"packed float32 {packing(torch.float32)}")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_few_of_the_kernels_compiled_are_kept_unless_the_user_wants_more(tiny_folder: Path) -> None:
    assert taken(tiny_folder, None) < taken(tiny_folder, "1024") / 2


def test_what_was_set_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `train` sets it before its base is loaded, and the user before that."""
    environment = {SETTINGS[0]: "7"}
    monkeypatch.setattr(onednn.os, "environ", environment)
    keep(MANY)
    keep(FEW)
    assert environment == {SETTINGS[0]: "7", SETTINGS[1]: str(MANY)}
