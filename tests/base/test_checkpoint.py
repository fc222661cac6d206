"""Checkpoints that other tools have quantised, read as those tools read them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from loradeck.base.checkpoint import Checkpoint, read_checkpoint, settings_of
from loradeck.base.load import Base
from loradeck.base.quantised import QuantisedWeight
from loradeck.errors import BaseModelError
from loradeck.runner.choice import runner_of
from loradeck.runner.native_runner import NativeRunner

IDS = torch.tensor([[1, 50, 60, 70, 3]])
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def read(folder: Path, *, keep: bool = True, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    checkpoint = Checkpoint(folder, settings_of(config))
    return read_checkpoint(checkpoint, config, dtype, keep=keep).eval()


def check(folder: Path, oracle: Tensor, kind: str | None, share: float = 1e-5) -> None:
    """Compare a checkpoint with the logits of another reader; its layers keep their bits as `kind`, or are plain."""
    plain = read(folder, keep=False)
    model = read(folder)
    weights = [module.weight for name, module in model.named_modules() if name.endswith(LINEARS)]
    kinds = {weight.quantised.kind.name if isinstance(weight, QuantisedWeight) else None for weight in weights}
    assert kinds == {kind}
    with torch.no_grad():
        for each in (model, plain):
            assert (each(IDS).logits - oracle).abs().max() <= share * oracle.abs().max()
    assert isinstance(runner_of(model), NativeRunner)


def rewritten(
    folder: Path, target: Path, settings: dict[str, Any], quantise: Callable[[Tensor], dict[str, Tensor]]
) -> Path:
    """Write a folder again, with other tensors for each linear layer's weight."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (target / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(LINEARS):
            tensors |= {f"{module}.{part}": each.contiguous() for part, each in quantise(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def replaced(folder: Path, weights: dict[str, Tensor]) -> Tensor:
    """The logits of the plain model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model.eval()(IDS).logits


# ---- bitsandbytes and compressed-tensors: the tools themselves write, and judge


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("NF4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("NF4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        (None, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("I8", {"load_in_8bit": True}),
    ],
    ids=["nf4", "nf4 twice", "fp4", "int8"],
)
@pytest.mark.filterwarnings("ignore")  # of the tool
def test_bitsandbytes(plain: Path, tmp_path: Path, kind: str | None, settings: dict[str, Any]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantised")
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not name.endswith(LINEARS):
            continue
        if "load_in_8bit" in settings:
            weights[f"{name}.weight"] = module.weight.data.float() * module.weight.SCB[:, None].float() / 127
        else:
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, module.weight.quant_state
            )
    check(tmp_path / "quantised", replaced(plain, weights), kind)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("U4", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}),
        ("U4", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}),
        ("U4", {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}),
        (None, {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}),
        ("I8", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    ],
    ids=["groups", "zeros", "channels", "fp8", "int8"],
)
@pytest.mark.filterwarnings("ignore")  # of the tool
def test_compressed_tensors(plain: Path, tmp_path: Path, kind: str | None, weights: dict[str, Any]) -> None:
    tools = pytest.importorskip("compressed_tensors", reason="needs pip install compressed-tensors loguru")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    form = "pack-quantized" if weights["num_bits"] == 4 else f"{weights['type']}-quantized"
    settings = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"], "format": form, "quant_method": "compressed-tensors", "quantization_status": "frozen",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    apply_quantization_config(model, QuantizationConfig(**settings))
    for name, module in model.named_modules():
        if name.endswith(LINEARS):
            size = weights.get("group_size") or module.in_features
            groups = module.weight.detach().unflatten(1, (-1, size))
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data = scale.half().float().view_as(module.weight_scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data = zero.to(module.weight_zero_point).view_as(module.weight_zero_point)
    compressor = tools.ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "quantised")
    compressor.update_config(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantised", dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    with torch.no_grad():
        oracle = again.eval()(IDS).logits
    check(tmp_path / "quantised", oracle, kind)


# ---- GPTQ and AWQ have tools for GPUs only: their layouts by definition


def integers(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes (…, n w) in w integers of 32 bits, the lowest bits first."""
    wide = codes.long().unflatten(-1, (-1, 32 // bits))
    return (wide << torch.arange(0, 32, bits)).sum(-1).to(torch.uint32).view(torch.int32)


def affine(weight: Tensor, size: int, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (O, I), scales and zeros (O, G) of groups of inputs, and the values."""
    order = torch.arange(weight.shape[1]) if order is None else order
    groups = weight[:, order].unflatten(1, (-1, size))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    values = ((codes - zeros[..., None]) * scales.float()[..., None]).flatten(1)
    back = order.argsort()
    return codes.flatten(1)[:, back].long(), scales, zeros.long(), values[:, back]


@pytest.mark.parametrize(("kind", "version", "ordered"), [("U4", 1, False), ("U4", 2, False), (None, 1, True)])
def test_gptq(plain: Path, tmp_path: Path, kind: str | None, version: int, ordered: bool) -> None:
    values: list[Tensor] = []

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0)) if ordered else None
        codes, scales, zeros, dense = affine(weight, 64, order)
        values.append(dense)
        index = torch.arange(weight.shape[1]) // 64
        return {
            "qweight": integers(codes).T,
            "qzeros": integers(zeros.T - int(version == 1)),
            "scales": scales.T,
            "g_idx": (index if order is None else index[order.argsort()]).int(),
        }

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": ordered}
    settings |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    folder = rewritten(plain, tmp_path / "quantised", settings, quantise)
    check(folder, replaced(plain, by_name(plain, values)), kind)


def test_awq(plain: Path, tmp_path: Path) -> None:
    values: list[Tensor] = []
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # of the outputs in an integer, the lowest bits first

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        codes, scales, zeros, dense = affine(weight, 64)
        values.append(dense)
        packed, packed_zeros = (
            integers(each.T.unflatten(1, (-1, 8))[..., order].flatten(1)) for each in (codes, zeros)
        )
        return {"qweight": packed, "qzeros": packed_zeros, "scales": scales.T}

    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    folder = rewritten(plain, tmp_path / "quantised", settings, quantise)
    check(folder, replaced(plain, by_name(plain, values)), "U4")


def test_fp8_in_blocks(plain: Path, tmp_path: Path) -> None:
    values: list[Tensor] = []

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        scales = torch.rand(-(-len(weight) // 48), -(-weight.shape[1] // 48)) / 100
        wide = scales.repeat_interleave(48, 0).repeat_interleave(48, 1)[: len(weight), : weight.shape[1]]
        codes = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        values.append(codes.float() * wide)
        return {"weight": codes, "weight_scale_inv": scales}

    settings = {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}
    folder = rewritten(plain, tmp_path / "quantised", settings, quantise)
    check(folder, replaced(plain, by_name(plain, values)), None)


def by_name(folder: Path, values: list[Tensor]) -> dict[str, Tensor]:
    """Give the values of `rewritten`'s layers their names."""
    names = [name for name in load_file(folder / "model.safetensors") if name.removesuffix(".weight").endswith(LINEARS)]
    return dict(zip(names, values, strict=True))


# ---- what is refused


def awq(plain: Path, target: Path, **changes: object) -> Path:
    def quantise(weight: Tensor) -> dict[str, Tensor]:
        codes, scales, zeros, _ = affine(weight, 64)
        return {"qweight": integers(codes.T), "qzeros": integers(zeros.T), "scales": scales.T}

    return rewritten(plain, target, {"quant_method": "awq", "bits": 4, "version": "gemm"} | changes, quantise)


def test_what_is_refused_is_named(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"awq has quantised: 8 bits"):
        read(awq(plain, tmp_path / "bits", bits=8))
    with pytest.raises(BaseModelError, match=r"the version 'gemv'"):
        read(awq(plain, tmp_path / "version", version="gemv"))
    folder = awq(plain, tmp_path / "missing")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.qweight"], tensors["model.layers.0.self_attn.q_proj.scales"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"no model\.layers\.0\.self_attn\.q_proj\.scales"):
        read(folder)


def test_a_base_of_such_a_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    values: list[Tensor] = []

    def quantise(weight: Tensor) -> dict[str, Tensor]:
        codes, scales, zeros, dense = affine(weight, 32)
        values.append(dense)
        return {"qweight": integers(codes).T, "qzeros": integers(zeros.T), "scales": scales.T}

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    folder = rewritten(tiny_folder, tmp_path / "quantised", settings, quantise)
    for path in tiny_folder.glob("token*"):
        shutil.copy(path, folder)
    oracle = replaced(tiny_folder, by_name(tiny_folder, values))
    for dtype, kept in (("auto", True), ("float32", False)):
        base = Base.load(folder, dtype=dtype, device="cpu")
        weight = base.model.model.layers[0].mlp.up_proj.weight
        assert isinstance(weight, QuantisedWeight) == kept
        with torch.no_grad():
            logits = base.model(IDS).logits.float()
        assert (logits - oracle).norm() <= (1e-5 if base.model.dtype == torch.float32 else 0.02) * oracle.norm()
    again = Base.load(folder, dtype="float32", device="cpu", weights="int8")
    assert again.model.model.layers[0].mlp.up_proj.weight.quantised.kind.name == "Q8_0"
    rewrite = json.loads((folder / "config.json").read_text())
    rewrite["quantization_config"]["quant_method"] = "quanto"
    (folder / "config.json").write_text(json.dumps(rewrite))
    with pytest.raises(BaseModelError, match="quanto"):
        Base.load(folder, device="cpu")
