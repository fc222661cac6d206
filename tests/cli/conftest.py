import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from loradeck.base.onednn import VARIABLES
from loradeck.cli import main
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig


class Ran(NamedTuple):
    """The exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ran]:
    """Run a command in this process, in a temporary folder, 100 columns wide; `typed` is its standard input."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in VARIABLES:
        monkeypatch.setenv(name, "1024")  # the default; otherwise a verb would cap the cache of all later tests

    def command(*arguments: object, typed: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", StringIO(typed))
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        return Ran(code, *capsys.readouterr())

    return command


def fill(model: nn.Module, seed: int) -> None:
    """Give every adapter of a model values that change its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)


@pytest.fixture
def adapters(tmp_path: Path, tiny: LlamaForCausalLM) -> Path:
    """A folder with `poet` (r=4, all-linear), `pirate` (r=8, two targets) and `cut`, whose tensors are cut short."""
    bank = Bank(tiny)
    bank.add("poet", LoraConfig(r=4))
    bank.add("pirate", LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "embed_tokens"]))
    for seed, name in enumerate(bank.names()):
        fill(bank[name], seed)
        bank.save(name, tmp_path / "adapters" / name)
    cut = tmp_path / "adapters" / "cut"
    cut.mkdir()
    for file in (tmp_path / "adapters" / "poet").iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[:2000])
    bank.detach()
    return tmp_path / "adapters"
