"""mlx-lm's folders, against their definition; and in mlx-lm itself, in a Python that has it: LORADECK_MLX names it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck import Adapter, Bank, Base, LoraConfig, convert
from loradeck.errors import AdapterError, ConfigError, UnsupportedError
from loradeck.lora.manifest import read_folder

PYTHON = os.environ.get("LORADECK_MLX") or (sys.executable if find_spec("mlx_lm") else "")
asks_mlx = pytest.mark.skipif(
    not PYTHON, reason="needs pip install 'mlx[cpu]' mlx-lm, here or in the environment of LORADECK_MLX=…/bin/python"
)
IDS = [[5, 80, 130, 7, 259, 3], [9, 9, 31, 64]]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
PARAMETERS = {"rank": 3, "scale": 2.5, "dropout": 0.1}
MIXED = LoraConfig(
    r=4, lora_alpha=12, use_rslora=True, rank_pattern={"q_proj": 6, "down_proj": 3}, alpha_pattern={"o_proj": 40}
)


def tensors(**own: tuple[int, ...]) -> dict[str, Tensor]:
    """Return a random mlx-lm adapter's tensors: those of q_proj, and others by name and shape."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{Q}.lora_a": (64, 3), f"{Q}.lora_b": (3, 64), **own}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def write(folder: Path, values: dict[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(values, folder / "adapters.safetensors")
    table = {"fine_tune_type": "lora", "num_layers": 16, "model": "org/base", "lora_parameters": PARAMETERS, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(table))
    return folder


def test_a_and_b_are_transposed_and_the_scale_is_the_scaling(tmp_path: Path) -> None:
    values = tensors()
    conversion = convert(write(tmp_path / "mlx", values), tmp_path / "peft")
    adapter = Adapter.load(tmp_path / "peft")
    a, b = adapter.pair(Q)
    assert torch.equal(a, values[f"{Q}.lora_a"].T)
    assert torch.equal(b, values[f"{Q}.lora_b"].T)
    assert adapter.sites[Q].scaling == pytest.approx(2.5, rel=1e-12)
    assert adapter.config.lora_dropout == 0.1
    assert adapter.origin.base_model == "org/base"
    assert conversion.adapter.sites == adapter.sites


def test_a_checkpoint_of_a_run_is_read_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "mlx", tensors())
    save_file({key: 2 * value for key, value in tensors().items()}, folder / "0000100_adapters.safetensors")
    convert(folder / "0000100_adapters.safetensors", tmp_path / "peft")
    assert torch.equal(Adapter.load(tmp_path / "peft").pair(Q)[0], 2 * tensors()[f"{Q}.lora_a"].T)


def test_a_round_trip_gives_the_same_tensors(tmp_path: Path) -> None:
    values = tensors(**{f"{DOWN}.lora_a": (96, 3), f"{DOWN}.lora_b": (3, 64)})
    convert(write(tmp_path / "mlx", values), tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "again", to="mlx")
    again = load_file(tmp_path / "again" / "adapters.safetensors")
    assert again.keys() == values.keys()
    assert all(torch.equal(again[key], value) for key, value in values.items())
    table = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert table["lora_parameters"] == {**PARAMETERS, "keys": ["mlp.down_proj", "self_attn.q_proj"]}


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ({}, {"fine_tune_type": "dora"}, "only lora can be converted"),
        ({}, {"fine_tune_type": "full"}, "only lora can be converted"),
        ({}, {"use_dora": True}, "only lora can be converted"),
        ({}, {"lora_parameters": {"rank": 8, "alpha": 16}}, "missing required field `scale`"),
        ({}, {"lora_parameters": {**PARAMETERS, "rank": 4}}, "lora_b (3, 64); adapter_config.json has rank 4"),
        ({}, {"lora_parameters": {**PARAMETERS, "scale": 1e300}}, "out of range"),
        ({}, {"lora_parameters": {**PARAMETERS, "dropout": 1}}, "out of range"),
        ({"x.lora_a": (4, 3)}, {}, "x has only one of lora_a and lora_b"),
        ({"x.m": (4,)}, {}, "unknown key 'x.m'"),
        ({"x.lora_a": (2, 3, 4), "x.lora_b": (2, 4, 3)}, {}, "experts of a mixture"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    values: dict[str, tuple[int, ...]], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "mlx", tensors(**values), **settings)
    with pytest.raises(AdapterError) as caught:
        convert(folder, tmp_path / "peft")
    assert message in str(caught.value)
    assert not (tmp_path / "peft").exists()


def test_a_folder_without_tensors_or_config_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "mlx", tensors())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        convert(folder, tmp_path / "peft")
    folder = write(tmp_path / "run", tensors())
    (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors")
    with pytest.raises(AdapterError, match=r"run holds no adapters\.safetensors"):
        convert(folder, tmp_path / "peft")


def test_other_commands_name_the_command_that_converts(tmp_path: Path) -> None:
    folder = write(tmp_path / "mlx", tensors())
    with pytest.raises(UnsupportedError) as caught:
        read_folder(folder)
    assert caught.value.text("cli") == (
        f"{folder} is an adapter of mlx-lm, not of PEFT\nConvert it: loradeck convert {folder} -o NEW"
    )


def test_the_embedding_needs_the_base(tmp_path: Path, tiny: LlamaForCausalLM, base: Base) -> None:
    """mlx-lm adapts a tied head with the embedding: the converted adapter has both."""
    values = tensors(**{"model.embed_tokens.lora_a": (260, 3), "model.embed_tokens.lora_b": (3, 64)})
    folder = write(tmp_path / "mlx", values, model=None)
    with pytest.raises(ConfigError, match="does not name its base, which is needed to know whether its head"):
        convert(folder, tmp_path / "peft")
    convert(folder, tmp_path / "untied", base=base)
    assert Adapter.load(tmp_path / "untied").sites.keys() == {Q, "model.embed_tokens"}
    tiny.config.tie_word_embeddings = True
    tiny.tie_weights()
    convert(folder, tmp_path / "tied", base=base)
    adapter = Adapter.load(tmp_path / "tied")
    assert adapter.sites.keys() == {Q, "model.embed_tokens", "lm_head"}
    convert(tmp_path / "tied", tmp_path / "again", to="mlx", base=base)
    again = load_file(tmp_path / "again" / "adapters.safetensors")
    assert again.keys() == values.keys()
    assert all(torch.equal(again[key], value) for key, value in values.items())
    with pytest.raises(UnsupportedError, match="mlx-lm adapts both alike"):
        convert(tmp_path / "untied", tmp_path / "never", to="mlx", base=base)
    assert not (tmp_path / "never").exists()


def test_modules_outside_of_the_layers_are_refused(tmp_path: Path) -> None:
    pairs = {"transformer.h.0.attn.c_attn": (torch.randn(2, 4), torch.randn(5, 2))}
    Adapter.of(LoraConfig(r=2), pairs).save(tmp_path / "peft")
    with pytest.raises(UnsupportedError, match=r"transformer\.h\.0\.attn\.c_attn is not in a layer"):
        convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_multimodal_model_is_to_be_merged_instead(tmp_path: Path, prefix: str) -> None:
    """mlx-lm has such models under paths of their own, and ignores keys that name none."""
    pairs = {f"{prefix}layers.0.self_attn.q_proj": (torch.randn(2, 4), torch.randn(5, 2))}
    Adapter.of(LoraConfig(r=2), pairs).save(tmp_path / "peft")
    with pytest.raises(UnsupportedError, match="q_proj is in the language model of a multimodal base") as caught:
        convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    assert caught.value.hint_for("cli") == "Merge it into its base, with loradeck merge, and convert that model."
    assert not (tmp_path / "mlx").exists()


def ask(base: Path, **asked: Any) -> list[Tensor]:
    """Return mlx-lm's logits, for each row (tokens, vocabulary)."""
    process = subprocess.run(
        [PYTHON, Path(__file__).with_name("mlx_reader.py")],
        input=json.dumps({"base": str(base), "adapter": "", "ids": IDS, **asked}),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return [torch.tensor(row) for row in json.loads(process.stdout)]


@torch.no_grad()
def ours(model: LlamaForCausalLM, folder: Path | None) -> list[Tensor]:
    bank = Bank(model)
    name = bank.load(folder, "it") if folder else None
    with bank.route(name):
        logits = [model(torch.tensor([row])).logits[0] for row in IDS]
    bank.detach()
    return logits


def distance(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


@asks_mlx
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"]])
def test_what_mlx_lm_saves_computes_the_same_here(
    keys: list[str] | None, tied: bool, tmp_path: Path, tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = saved_base(tmp_path, tiny, tiny_tokenizer, tied=tied)
    parameters = {**PARAMETERS, **({"keys": keys} if keys else {})}
    theirs = ask(folder, save=str(tmp_path / "mlx"), num_layers=1, lora_parameters=parameters)
    assert distance(ask(folder), ours(tiny, None)) < 1e-4
    convert(tmp_path / "mlx", tmp_path / "peft")
    assert distance(theirs, ours(tiny, tmp_path / "peft")) < 1e-4
    assert distance(theirs, ours(tiny, None)) > 0.1
    convert(tmp_path / "peft", tmp_path / "again", to="mlx", base=folder)
    assert distance(ask(folder, adapter=str(tmp_path / "again")), theirs) < 1e-6


@asks_mlx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_computes_the_same_in_mlx_lm(
    dtype: torch.dtype, tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path
) -> None:
    """Ranks and scalings of all sorts become one rank and one scale."""
    bank = Bank(tiny)
    bank.add("mixed", MIXED)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bank.parameters("mixed"):
            parameter.normal_(0, 0.2, generator=generator)
    pairs = {path: tuple(half.to(dtype) for half in bank["mixed"].pair(path)) for path in bank["mixed"].sites}
    Adapter.with_sites(bank["mixed"].config, bank["mixed"].sites, pairs).save(tmp_path / "peft")
    bank.detach()
    conversion = convert(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    assert {site.r for site in conversion.adapter.sites.values()} == {6}
    assert len({site.scaling for site in conversion.adapter.sites.values()}) == 1
    theirs = ask(tiny_folder, adapter=str(tmp_path / "mlx"))
    assert distance(theirs, ours(tiny, tmp_path / "peft")) < 1e-4
    assert distance(theirs, ours(tiny, None)) > 0.1


def saved_base(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, tied: bool) -> Path:
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"
