"""int8 and int4 weights of a checkpoint: quantised while it is read, as `prepare` quantises the plain model."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loradeck.base import load
from loradeck.base.load import Base
from loradeck.base.quantised import QuantisedWeight
from loradeck.base.weights import prepare
from loradeck.errors import BaseModelError, ConfigError

Small = Callable[..., LlamaForCausalLM]
IDS = torch.arange(3, 40)[None]
UP = "model.layers.1.mlp.up_proj.weight"
SLACK = 32 << 20  # bytes: parts of a weight while it is quantised, and what the allocator keeps


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model is not loaded first."""
    monkeypatch.setattr(load, "pretrained_model", None)


def values(base: Base) -> dict[str, Tensor]:
    return dict(base.model.named_parameters())


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Change the tensors of a folder's only file."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    save_file(dict(change(tensors)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("streamed")
def test_it_is_the_plain_base_prepared(
    small: Small, tiny_folder: Path, weights: str, dtype: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_folder / "model.safetensors").unlink()
    small(tied=tied).save_pretrained(tiny_folder, max_shard_size="500KB")
    base = Base.load(tiny_folder, dtype=dtype, device="cpu", weights=weights)
    monkeypatch.undo()
    plain = Base.load(tiny_folder, dtype=dtype, device="cpu")
    assert base.fingerprint == plain.fingerprint
    assert base.model.generation_config.to_dict() == plain.model.generation_config.to_dict()
    prepare(plain.model, weights)
    expected, result = values(plain), values(base)
    assert [*result] == [*expected]
    assert sum(isinstance(each, QuantisedWeight) for each in result.values()) == 14 + 1 + (not tied)
    assert all(torch.equal(result[path], each) and result[path].dtype == each.dtype for path, each in expected.items())
    assert not any(each.requires_grad for each in result.values())
    assert not base.model.training
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, plain.model(IDS).logits)


def test_a_checkpoint_with_other_names_is_loaded_whole_first(small: Small, tiny_folder: Path) -> None:
    """transformers knows what they were."""
    small(tied=True).save_pretrained(tiny_folder)
    base = Base.load(tiny_folder, dtype="float32", device="cpu", weights="int8")
    rewrite(tiny_folder, lambda tensors: {path.removeprefix("model."): each for path, each in tensors.items()})
    again = Base.load(tiny_folder, dtype="float32", device="cpu", weights="int8")
    assert again.fingerprint == base.fingerprint
    assert all(torch.equal(each, values(base)[path]) for path, each in values(again).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {path: each for path, each in tensors.items() if path != UP},
            rf"lacks weights of its LlamaForCausalLM: {UP}",
        ),
        (lambda tensors: tensors | {UP: tensors[UP][:-1].clone()}, rf"{UP} is \(319, 256\), not \(320, 256\)"),
        (lambda tensors: tensors | {UP: tensors[UP] / 0}, rf"{UP} has values that are NaN or Inf"),
        (lambda tensors: tensors | {UP: tensors[UP] * 1e12}, rf"{UP} has values beyond the range of Q4_1's scales"),
    ],
)
def test_what_is_wrong_with_a_weight_is_said(
    small: Small, tiny_folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    small().save_pretrained(tiny_folder)
    rewrite(tiny_folder, change)
    with pytest.raises(BaseModelError, match=message):
        Base.load(tiny_folder, dtype="float32", device="cpu", weights="int4")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_cannot_be_quantised_is_refused_before_it_is_read(
    tiny_folder: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=rf"{weights} weights need a CPU and bfloat16 or float32"):
        Base.load(tiny_folder, dtype="float16", device="cpu", weights=weights)
    (tiny_folder / "config.json").unlink()
    (tiny_folder / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=8, n_head=2)).save_pretrained(tiny_folder)
    monkeypatch.setattr(load, "pretrained_model", None)
    with pytest.raises(ConfigError, match=r"most weights of this GPT2LMHeadModel are outside nn\.Linear"):
        Base.load(tiny_folder, dtype="float32", device="cpu", weights=weights)


MEASURED = """
import json, sys
from pathlib import Path
from loradeck.base.load import Base

def field(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) << 10

small, large, weights = sys.argv[1:]
Base.load(small, dtype="float32", device="cpu", weights=weights)  # what is imported and compiled once
Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
before = field("VmRSS:")
base = Base.load(large, dtype="float32", device="cpu", weights=weights)
print(json.dumps([field("VmHWM:") - before, sum(each.nbytes for each in base.model.parameters())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which says what the peak was")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_peak_is_the_result_and_one_weight(small: Small, tiny_folder: Path, tmp_path: Path, weights: str) -> None:
    """300 MB in float32; the largest weight, the embedding, has 33 MB: as it is read, and a copy."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    largest = max(each.nbytes for each in model.parameters())
    plain = sum(each.nbytes for each in model.parameters())
    for folder, each in ((tmp_path / "large", model), (tmp_path / "small", small())):
        each.save_pretrained(folder)
        for file in tiny_folder.glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
    del model
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "small"), str(tmp_path / "large"), weights]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, result = json.loads(done.stdout)
    assert result < 0.3 * plain
    assert peak < result + 2 * largest + SLACK < 0.7 * plain
