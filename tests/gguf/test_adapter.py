"""The file that llama.cpp reads: names, shapes, order of rows, and a scaling of alpha / r. test_llamacpp.py runs it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loradeck import Adapter, LoraConfig
from loradeck.errors import AdapterError, UnsupportedError
from loradeck.gguf.adapter import export
from loradeck.llamacpp import Architecture
from loradeck.lora.manifest import TargetModule

gguf = pytest.importorskip("gguf", reason="needs pip install gguf")

WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY = 32, 40, 4, 2, 50
Q, K, DOWN = (f"model.layers.{path}" for path in ("0.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.down_proj"))
NAMES = {Q: "blk.0.attn_q.weight", K: "blk.1.attn_k.weight", DOWN: "blk.1.ffn_down.weight"}
SHAPES = {"blk.0.attn_q.weight": (WIDTH, WIDTH), "blk.1.attn_k.weight": (16, WIDTH), NAMES[DOWN]: (WIDTH, INNER)}
TIED = {**SHAPES, "token_embd.weight": (VOCABULARY, WIDTH)}
LLAMA = Architecture("llama", HEADS, KV_HEADS, {**TIED, "output.weight": (VOCABULARY, WIDTH)})
QWEN = Architecture("qwen2", HEADS, KV_HEADS, TIED)


def made(config: LoraConfig, *paths: str, dtype: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    shapes = {path: LLAMA.shapes[name] for path, name in NAMES.items()}
    pairs = {}
    for path in paths or NAMES:
        rows, columns = shapes.get(path, (WIDTH, WIDTH))
        a, b = torch.randn(config.rank(path), columns, generator=generator), torch.randn(rows, config.rank(path))
        pairs[path] = (a.to(dtype), b.to(dtype))
    return Adapter.of(config, pairs)


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = gguf.GGUFReader(file)
    header = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return header, {each.name: torch.from_numpy(each.data.copy()) for each in reader.tensors}


def update(tensors: dict[str, Tensor], alpha: float, name: str) -> Tensor:
    """Return what llama.cpp adds to a weight: llama_adapter_lora_weight::get_scale in its src/llama-adapter.h."""
    a, b = tensors[f"{name}.lora_a"].float(), tensors[f"{name}.lora_b"].float()
    return (alpha / b.shape[1] if alpha else 1.0) * b @ a


def paired(update: Tensor, heads: int) -> Tensor:
    """Return rows as llama.cpp rotates them: the first row of a head beside the one that it is rotated with."""
    size = len(update) // heads
    order = [head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return update[order]


CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=10),
    "ranks": LoraConfig(r=4, lora_alpha=10, rank_pattern={"q_proj": 7, "down_proj": 1}),
    "alphas": LoraConfig(r=3, lora_alpha=10, alpha_pattern={"k_proj": -2.5, "down_proj": 0}),
    "rslora": LoraConfig(r=4, lora_alpha=10, use_rslora=True, rank_pattern={"q_proj": 7}),
    "nothing": LoraConfig(r=4, lora_alpha=0),
    "almost nothing": LoraConfig(r=4, lora_alpha=1e-60, alpha_pattern={"q_proj": 3}),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("base", [LLAMA, QWEN], ids=lambda base: base.name)
def test_the_update_is_the_adapters_in_llama_cpps_order(name: str, base: Architecture, tmp_path: Path) -> None:
    adapter = made(CONFIGS[name])
    alpha = export(adapter, base, tmp_path / "a.gguf")
    header, tensors = read(tmp_path / "a.gguf")
    assert header == {
        "general.architecture": base.name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": pytest.approx(alpha),
    }
    assert tensors.keys() == {f"{weight}.{half}" for weight in NAMES.values() for half in ("lora_a", "lora_b")}
    for path, weight in NAMES.items():
        a, b = adapter.pair(path)
        expected = adapter.sites[path].scaling * b @ a
        if base is LLAMA and path != DOWN:
            expected = paired(expected, HEADS if path == Q else KV_HEADS)
        torch.testing.assert_close(update(tensors, header["adapter.lora.alpha"], weight), expected)


def test_tensors_that_need_no_change_are_the_very_same(tmp_path: Path) -> None:
    adapter = made(LoraConfig(r=49, lora_alpha=16), dtype=torch.bfloat16)
    assert export(adapter, QWEN, tmp_path / "a.gguf") == pytest.approx(16, rel=1e-12)
    _, tensors = read(tmp_path / "a.gguf")
    for path, name in NAMES.items():
        for half, tensor in zip(("lora_a", "lora_b"), adapter.pair(path), strict=True):
            assert torch.equal(tensors[f"{name}.{half}"], tensor.float())


def test_an_embedding_is_read_by_rows(tmp_path: Path) -> None:
    a, b = torch.randn(4, VOCABULARY), torch.randn(WIDTH, 4)
    adapter = embedding(a, b)
    export(adapter, LLAMA, tmp_path / "a.gguf")
    _, tensors = read(tmp_path / "a.gguf")
    assert torch.equal(tensors["token_embd.weight.lora_a"], a.T)
    assert torch.equal(tensors["token_embd.weight.lora_b"], b)


def test_half_precision_halves_the_file(tmp_path: Path) -> None:
    adapter = made(LoraConfig(r=16, lora_alpha=10))
    export(adapter, LLAMA, tmp_path / "full.gguf")
    export(adapter, LLAMA, tmp_path / "half.gguf", dtype="float16")
    (_, full), (_, half) = read(tmp_path / "full.gguf"), read(tmp_path / "half.gguf")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert all(torch.equal(half[name], full[name].half()) for name in full)
    assert (tmp_path / "half.gguf").stat().st_size < 0.6 * (tmp_path / "full.gguf").stat().st_size


def test_what_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    adapter = made(LoraConfig(r=4, lora_alpha=10, alpha_pattern={"q_proj": 1e7}))
    with pytest.raises(AdapterError, match=r"blk\.0\.attn_q\.weight\.lora_b has values beyond float16's range"):
        export(adapter, LLAMA, tmp_path / "a.gguf", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    export(adapter, LLAMA, tmp_path / "a.gguf")


def test_everything_that_cannot_be_is_named_at_once(tmp_path: Path) -> None:
    config = LoraConfig(r=4)
    adapter = Adapter.of(
        config,
        {
            Q: (torch.randn(4, WIDTH), torch.randn(WIDTH, 4)),
            "model.layers.0.mixer.in_proj": (torch.randn(4, WIDTH), torch.randn(WIDTH, 4)),
            "model.layers.7.mlp.up_proj": (torch.randn(4, WIDTH), torch.randn(INNER, 4)),
            "lm_head": (torch.randn(4, WIDTH), torch.randn(VOCABULARY, 4)),
            DOWN: (torch.randn(4, WIDTH), torch.randn(WIDTH, 4)),
            "model.conv": (torch.randn(4, 3, 3), torch.randn(8, 4, 1)),
        },
    )
    with pytest.raises(UnsupportedError) as caught:
        export(adapter, QWEN, tmp_path / "a.gguf")
    assert caught.value.problems == (
        "model.layers.0.mixer.in_proj is not a weight of this qwen2 base",
        "model.layers.7.mlp.up_proj is not a weight of this qwen2 base",
        "lm_head shares its weight: llama.cpp would adapt both the embedding and the head",
        "model.layers.1.mlp.down_proj is (32, 32) in the adapter and (32, 40) in the base",
        "model.conv is a convolution",
    )
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_that_is_the_head_too_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"model\.embed_tokens shares its weight"):
        export(embedding(torch.randn(4, VOCABULARY), torch.randn(WIDTH, 4)), QWEN, tmp_path / "a.gguf")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"a\.gguf cannot be written: Not a directory"):
        export(made(LoraConfig(r=4)), LLAMA, tmp_path / "file" / "a.gguf")


def embedding(a: Tensor, b: Tensor) -> Adapter:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"])
    site = TargetModule("embedding", 4, 2.0, tuple(a.shape), tuple(b.shape))
    return Adapter.with_sites(config, {"model.embed_tokens": site}, {"model.embed_tokens": (a, b)})
