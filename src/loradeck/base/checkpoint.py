"""Checkpoints in safetensors that other tools have quantised: GPTQ, AWQ, compressed-tensors, bitsandbytes and FP8.

Weights keep their bits where they are 4 or 8 in groups of whole blocks; the others become plain.

O outputs   I inputs   G groups of inputs that share a scale
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from loradeck.base.skeleton import Skeleton
from loradeck.base.weights import QUANTISED, Weights, quantisable, set_quantised
from loradeck.errors import BaseModelError
from loradeck.native.quantised import KINDS, Quantised, pack

INDEX = "model.safetensors.index.json"
COMPLETE = "Copy all the model's files again."
HINT = "Load the checkpoint that it was made from, with weights quantised at load: int8 or int4."
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the outputs 0 to 7 lie in an integer


class Checkpoint:
    """The tensors of a folder, and how they are quantised."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], keys: Mapping[str, str] | None = None) -> None:
        """Open a folder.

        Args:
            folder: What it holds besides `*.safetensors` is not read.
            settings: The configuration's `quantization_config`.
            keys: Those tensors that count, by the names that they have here; the files with the others stay closed.
        """
        self.folder, self.settings = folder, settings
        files = files_of(folder)
        self.keys: Mapping[str, str] = {key: key for key in files} if keys is None else keys
        self.files: Mapping[str, Path] = {name: files[key] for name, key in self.keys.items()}

    @property
    def method(self) -> str:
        return str(self.settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in self.settings else None))

    def get(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            BaseModelError: it is missing.
        """
        if name not in self.files:
            raise BaseModelError(f"{self.folder} has no {name}", hint=COMPLETE)
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.keys[name])
        return tensor

    @contextmanager
    def slices(self) -> Iterator[dict[str, Any]]:
        """Open the files until the block ends: yield for each tensor what reads it, or a part of it."""
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in {*self.files.values()}}
            yield {name: opened[path].get_slice(self.keys[name]) for name, path in self.files.items()}

    def generation_config(self) -> GenerationConfig | None:
        """Return the folder's settings for generation, None if it has none."""
        there = (self.folder / "generation_config.json").exists()
        return GenerationConfig.from_pretrained(self.folder) if there else None

    @cached_property
    def weights_settings(self) -> Mapping[str, Any]:
        """Of compressed-tensors: how the weights of the only group of modules are quantised."""
        groups = [*self.settings.get("config_groups", {}).values()]
        if len(groups) != 1:
            raise self.refusal(f"it has {len(groups)} groups of modules")
        return groups[0]["weights"]

    def reading(self, path: str) -> "Reading | None":
        """Return how to read a parameter that is quantised; None of one that is not, or is missing."""
        marks, module = MARKS.get(self.method, {}), path.removesuffix(".weight")
        return next((each for mark, each in marks.items() if module + mark in self.files), None)

    def refusal(self, reason: str) -> BaseModelError:
        return BaseModelError(f"cannot read {self.folder}, which {self.method} has quantised: {reason}", hint=HINT)


def files_of(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor in a folder, by its index if there is one; else each file's header is read.

    Files that are not there have no tensors.

    Raises:
        BaseModelError: the index is not valid.
    """
    index = folder / INDEX
    if index.is_file() and not (folder / "model.safetensors").is_file():  # which transformers prefers
        table = json.loads(index.read_bytes())
        shards = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise BaseModelError(f"{index} has no weight_map", hint=COMPLETE)
        for name in sorted({*shards.values()}):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise BaseModelError(f"{index} names the file {name!r}, which is not one of this folder's")
        there = {name for name in {*shards.values()} if (folder / name).is_file()}
        return {key: folder / name for key, name in shards.items() if name in there}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


Weight: TypeAlias = Tensor | Quantised
Reading: TypeAlias = Callable[[Checkpoint, str], Weight]
"""From a module's path to its weight (O, I)."""


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether a checkpoint with this configuration is quantised by a tool of `MARKS`."""
    return bool(settings_of(config)) and Checkpoint(Path(), settings_of(config)).method in MARKS


def is_direct(checkpoint: Checkpoint, config: PretrainedConfig) -> bool:
    """Return whether a checkpoint's tensors are the parameters of its model, none renamed, joined or tied elsewhere."""
    if checkpoint.settings and checkpoint.method not in MARKS:
        return False
    skeleton = Skeleton(_without_settings(config), torch.float32)
    buffers = {
        f"{path}.{name}"
        for path, module in skeleton.model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    if checkpoint.settings:  # what is missing is told by who reads it
        return not buffers and any(map(checkpoint.reading, skeleton.shapes))
    return not buffers and skeleton.shapes.keys() <= checkpoint.files.keys()


def read_checkpoint(
    checkpoint: Checkpoint, config: PretrainedConfig, dtype: torch.dtype, *, keep: bool, weights: Weights = "plain"
) -> PreTrainedModel:
    """Return the model of a checkpoint that is plain or that a tool of `MARKS` has quantised, read weight by weight.

    With `keep`, weights keep their bits where they can; else all are plain. If `weights` is int8 or int4, those that it
    holds are quantised anew: each is read, quantised and freed before the next.

    Raises:
        BaseModelError: weights are missing, have other shapes, or a layout that is not known.
        ConfigError: most weights of the model would not become int8 or int4.
    """
    skeleton = Skeleton(_without_settings(config), dtype)
    skeleton.model.requires_grad_(False)
    layers = quantisable(skeleton.model, weights) if weights in QUANTISED else {}
    missing: list[str] = []
    problems: list[str] = []
    for path, shape in skeleton.shapes.items():
        reading = checkpoint.reading(path)
        if reading is None and path not in checkpoint.files:
            missing.append(path)
            continue
        value = reading(checkpoint, path.removesuffix(".weight")) if reading else checkpoint.get(path)
        if value.shape != shape:
            problems.append(f"{path} is {tuple(value.shape)}, not {tuple(shape)}")
            continue
        if isinstance(value, Quantised) and (path in layers or not (keep and skeleton.takes_quantised(path))):
            value = value.dense(dtype=dtype)
        if path in layers:
            set_quantised(layers[path], cast("Tensor", value).to(dtype), weights, path)
        else:
            skeleton.set(path, value)
    if missing or problems:
        names = [f"{path} is missing" for path in missing]
        kind = type(skeleton.model).__name__
        raise BaseModelError(
            f"{checkpoint.folder} does not have the weights of its {kind}",
            names + problems,
            hint=COMPLETE,
        )
    if (settings := checkpoint.generation_config()) is not None:
        skeleton.model.generation_config = settings
    return skeleton.model


def settings_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """Return a configuration's `quantization_config`."""
    settings = getattr(config, "quantization_config", {})
    return settings if isinstance(settings, Mapping) else settings.to_dict()


def _without_settings(config: PretrainedConfig) -> PretrainedConfig:
    kind, values = type(config), config.to_dict()
    values.pop("quantization_config", None)
    return kind.from_dict(values)


# ---- each tool's layout


def _gptq(checkpoint: Checkpoint, module: str) -> Weight:
    """scale · (code - zero - 1): codes (I / n, O), zeros (G, O / n), scales (G, O), n codes in an integer."""
    bits = int(checkpoint.settings["bits"])
    if bits not in (4, 8):
        raise checkpoint.refusal(f"{bits} bits")
    codes = _codes(checkpoint.get(f"{module}.qweight").T, bits)
    scales = checkpoint.get(f"{module}.scales").T
    zeros = _codes(checkpoint.get(f"{module}.qzeros"), bits).T
    if checkpoint.settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)
    group = checkpoint.settings["group_size"]
    places = torch.arange(codes.shape[1]) // (codes.shape[1] if group == -1 else group)
    index = f"{module}.g_idx"
    if index in checkpoint.files and not torch.equal(groups := checkpoint.get(index).long(), places):
        return (codes - zeros[:, groups]) * scales[:, groups].float()  # inputs of a group do not lie together
    return _u4_or_plain(codes, scales, zeros, bits)


def _awq(checkpoint: Checkpoint, module: str) -> Weight:
    """scale · (code - zero): codes (I, O / 8), zeros (G, O / 8), scales (G, O), 8 outputs in an integer."""
    if (version := str(checkpoint.settings.get("version", "gemm")).lower()) != "gemm":
        raise checkpoint.refusal(f"the version {version!r}")
    if (bits := int(checkpoint.settings.get("bits", 4))) != 4:
        raise checkpoint.refusal(f"{bits} bits")
    codes, zeros = (
        _codes(checkpoint.get(f"{module}.{name}"), 4).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T
        for name in ("qweight", "qzeros")
    )
    return _u4_or_plain(codes, checkpoint.get(f"{module}.scales").T, zeros, 4)


def _packed(checkpoint: Checkpoint, module: str) -> Weight:
    """Scale · (code - zero), of signed codes to which half their range is added: codes (O, I / n), scales (O, G)."""
    bits, actorder = int(checkpoint.weights_settings["num_bits"]), checkpoint.weights_settings.get("actorder")
    if bits not in (4, 8):
        raise checkpoint.refusal(f"{bits} bits")
    outputs, inputs = checkpoint.get(f"{module}.weight_shape").tolist()
    codes = _codes(checkpoint.get(f"{module}.weight_packed"), bits)[:outputs, :inputs]
    scales = checkpoint.get(f"{module}.weight_scale")
    zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int32)
    name = f"{module}.weight_zero_point"
    if name in checkpoint.files:
        zeros = _codes(checkpoint.get(name).T, bits).T[:outputs]
    index = f"{module}.weight_g_idx"
    if actorder in ("group", True) and index in checkpoint.files:
        groups = checkpoint.get(index).long()
        return (codes - zeros[:, groups]) * scales[:, groups].float()
    return _u4_or_plain(codes, scales, zeros, bits)


def _scaled(checkpoint: Checkpoint, module: str) -> Weight:
    """scale · weight: weight (O, I) in int8 or float8, scales (O, 1) or one."""
    weight, scales = checkpoint.get(f"{module}.weight"), checkpoint.get(f"{module}.weight_scale").float()
    if f"{module}.weight_zero_point" in checkpoint.files and checkpoint.get(f"{module}.weight_zero_point").any():
        raise checkpoint.refusal("asymmetric weights of 8 bits")
    scales = scales.reshape(-1, 1).expand(len(weight), 1) if scales.numel() == 1 else scales
    return _i8_or_plain(weight, scales)


def _bytes(checkpoint: Checkpoint, module: str) -> Weight:
    """Weight · SCB / 127: weight (O, I) in int8, SCB (O,)."""
    return _i8_or_plain(checkpoint.get(f"{module}.weight"), checkpoint.get(f"{module}.SCB").float()[:, None] / 127)


def _four_bits(checkpoint: Checkpoint, module: str) -> Weight:
    """map[code] · absmax of 64 weights: two codes in a byte, the first in the upper bits; absmax may be quantised."""
    name = f"{module}.weight"
    key = next(key for key in checkpoint.files if key.startswith(f"{name}.quant_state.bitsandbytes__"))
    state = json.loads(bytes(checkpoint.get(key).tolist()))
    values, absmax = checkpoint.get(f"{name}.quant_map").float(), checkpoint.get(f"{name}.absmax")
    if f"{name}.nested_absmax" in checkpoint.files:
        nested, scales = (checkpoint.get(f"{name}.nested_{each}").float() for each in ("quant_map", "absmax"))
        places = torch.arange(len(absmax)) // int(state["nested_blocksize"])
        absmax = nested[absmax.int()] * scales[places] + float(state["nested_offset"])
    both = checkpoint.get(name).flatten()
    (outputs, inputs), size = state["shape"], int(state["blocksize"])
    codes = torch.stack((both >> 4, both & 15), 1).flatten()[: outputs * inputs].view(outputs, inputs)
    if state["quant_type"] == "nf4" and inputs % size == 0 and size % 32 == 0:
        scales = absmax.float().view(outputs, inputs // size)
        return _blocks("NF4", scales, _nibbles(codes), inputs)
    scale = absmax.float().repeat_interleave(size)[: outputs * inputs].view(outputs, inputs)
    return values[codes.int()] * scale


def _fp8(checkpoint: Checkpoint, module: str) -> Weight:
    """Weight · scale of its block: weight (O, I) in float8, scales (O / n, I / m)."""
    weight, scales = checkpoint.get(f"{module}.weight"), checkpoint.get(f"{module}.weight_scale_inv").float()
    rows, columns = checkpoint.settings.get("weight_block_size") or (len(weight), weight.shape[1])
    scales = scales.reshape(-(-len(weight) // rows), -1)
    wide = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return weight.float() * wide[: len(weight), : weight.shape[1]]


MARKS: Mapping[str, Mapping[str, Reading]] = {
    "gptq": {".qweight": _gptq},
    "awq": {".qweight": _awq},
    "compressed-tensors": {".weight_packed": _packed, ".weight_scale": _scaled},
    "bitsandbytes": {
        ".weight.quant_state.bitsandbytes__nf4": _four_bits,
        ".weight.quant_state.bitsandbytes__fp4": _four_bits,
        ".SCB": _bytes,
    },
    "fp8": {".weight_scale_inv": _fp8},
}
"""By tool, how to read a module that has a tensor of this name."""


def _codes(integers: Tensor, bits: int) -> Tensor:
    """Return the codes (…, n w) of w integers of 32 bits, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((integers[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def _u4_or_plain(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Weight:
    """scale · (code - zero): codes (O, I), scales and zeros (O, G)."""
    size = codes.shape[1] // scales.shape[1]
    exact = torch.equal(scales.half().to(scales.dtype), scales)
    if bits == 4 and size % 32 == 0 and scales.shape[1] * size == codes.shape[1] and exact:
        return _blocks("U4", scales.half(), _nibbles(codes), codes.shape[1], zeros)
    each = torch.arange(codes.shape[1]) // size
    return (codes - zeros[:, each]) * scales.float()[:, each]


def _i8_or_plain(weight: Tensor, scales: Tensor) -> Weight:
    """scale · weight: weight (O, I), scales (O, G)."""
    size = weight.shape[1] // scales.shape[1]
    if weight.dtype == torch.int8 and size % 32 == 0 and scales.shape[1] * size == weight.shape[1]:
        return _blocks("I8", scales, weight.unflatten(1, (-1, 32)).view(torch.uint8), weight.shape[1])
    return weight.float() * scales.repeat_interleave(size, 1)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes (O, I) -> (O, I / 32, 16), as Q4_0 has them."""
    low, high = codes.unflatten(1, (-1, 32)).chunk(2, -1)
    return (low | high << 4).to(torch.uint8)


def _blocks(kind: str, scales: Tensor, codes: Tensor, inputs: int, zeros: Tensor | None = None) -> Quantised:
    """Scales and zeros (O, G), codes (O, I / 32, bytes)."""
    times = codes.shape[1] // scales.shape[1]
    parts = [
        scales.contiguous()[..., None].view(torch.uint8),
        *([] if zeros is None else [zeros[..., None].to(torch.uint8)]),
    ]
    data = torch.cat([*(part.repeat_interleave(times, 1) for part in parts), codes], -1)
    return pack(data.flatten(1), KINDS[kind], inputs)
