"""mlx-lm's adapters, read and written: adapters.safetensors, and an adapter_config.json of its own.

    y = W x + scale · (x lora_a) lora_b        lora_a (in, r) · lora_b (r, out): A and B transposed

There is one rank and one scale. An embedding's lora_a has a row per token; where the base ties its head to the
embedding, the adapter of the embedding is the head's too. The format is defined by its reader, mlx-lm's tuner/utils.py
and tuner/lora.py; the facts are from version 0.32.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor

from loradeck.disk import new_folder
from loradeck.errors import AdapterError, UnsupportedError, shorten
from loradeck.lora.adapter import Adapter, raw
from loradeck.lora.config import MAX_ALPHA, MAX_RANK
from loradeck.lora.folder import CONFIG
from loradeck.lora.foreign import MLX_TENSORS
from loradeck.lora.manifest import TargetModule, config_of
from loradeck.lora.peft import Origin, read_content
from loradeck.lora.safetensors_io import encode, read_header
from loradeck.lora.uniform import uniform
from loradeck.lora.whole_model import PLACES

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ENDS = ".lora_a", ".lora_b"
LAYER = re.compile(r"model\.layers\.\d+\.(.+)")
AGAIN = "Copy or download the adapter again."


class _Parameters(msgspec.Struct):
    rank: int
    scale: float
    dropout: float = 0.0


class _Config(msgspec.Struct):
    lora_parameters: _Parameters
    fine_tune_type: str = "lora"
    use_dora: bool = False
    model: str | None = None


def touches_vocabulary(adapter: Adapter) -> bool:
    """Return whether it matters that the base ties its head to the embedding."""
    return not adapter.sites.keys().isdisjoint((EMBEDDING, HEAD))


def read(folder: Path, *, tensors: Path | None = None) -> Adapter:
    """Read mlx-lm's folder; `tensors` is a file of a checkpoint in place of adapters.safetensors.

    If the base ties its head to the embedding, the result needs `with_tied_head`.

    Raises:
        UnsupportedError: it is DoRA, a whole model, or adapts experts.
        AdapterError: with every problem found.
    """
    config = _config(folder / CONFIG)
    parameters = config.lora_parameters
    path = tensors or folder / MLX_TENSORS
    try:
        entries = read_header(path).entries
    except FileNotFoundError:
        raise AdapterError(f"{folder} holds no {MLX_TENSORS}", hint=AGAIN) from None
    problems = [f"unknown key {shorten(key, 120)}" for key in entries if not key.endswith(ENDS)]
    modules = dict.fromkeys(key.removesuffix(end) for key in entries for end in ENDS if key.endswith(end))
    if experts := [module for module in modules if len(getattr(entries.get(module + ENDS[0]), "shape", ())) == 3]:
        raise UnsupportedError(
            f"{path} adapts the experts of a mixture", [f"{module} has 3 dimensions" for module in experts]
        )
    for module in modules:
        a, b = (getattr(entries.get(module + end), "shape", None) for end in ENDS)
        if a is None or b is None:
            problems.append(f"{module} has only one of lora_a and lora_b")
        elif len(a) != 2 or len(b) != 2 or a[1] != parameters.rank or b[0] != parameters.rank:
            problems.append(f"{module} has lora_a {a} and lora_b {b}; {CONFIG} has rank {parameters.rank}")
    if not modules and not problems:
        problems.append("it has no lora_a and no lora_b")
    if problems:
        raise AdapterError(f"{path} is incomplete or inconsistent", problems, hint=AGAIN)
    values = load_file(path)
    pairs = {module: _transposed(*(values[module + end] for end in ENDS)) for module in modules}
    return _adapter(pairs, parameters.scale, parameters.dropout, Origin(config.model))


def _config(path: Path) -> _Config:
    try:
        config = msgspec.json.decode(read_content(path), type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid: {error}", hint=AGAIN) from None
    if config.use_dora or config.fine_tune_type != "lora":
        kind = "dora" if config.use_dora else shorten(config.fine_tune_type)
        raise UnsupportedError(
            f"{path} has fine_tune_type {kind}; only lora can be converted", hint="Fuse it into its base with mlx-lm."
        )
    rank, scale, dropout = msgspec.structs.astuple(config.lora_parameters)
    if not (1 <= rank <= MAX_RANK and abs(scale * rank) <= MAX_ALPHA and 0 <= dropout < 1):
        raise AdapterError(f"{path} has lora_parameters out of range", hint="Correct rank, scale or dropout.")
    return config


def _transposed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.T.contiguous(), b.T.contiguous()


def _adapter(pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float, dropout: float, origin: Origin) -> Adapter:
    sites = {
        path: TargetModule(
            "embedding" if path == EMBEDDING else "linear", len(a), scale, tuple(a.shape), tuple(b.shape)
        )
        for path, (a, b) in pairs.items()
    }
    config = replace(config_of(sites), lora_dropout=dropout)
    return Adapter.with_sites(config, sites, pairs, origin=origin)


def with_tied_head(adapter: Adapter) -> Adapter:
    """Return an adapter of a base that ties its head to the embedding: the head gets the embedding's update too."""
    if EMBEDDING not in adapter.sites:
        return adapter
    pairs = {path: adapter.pair(path) for path in adapter.sites}
    a, b = pairs[EMBEDDING]
    pairs[HEAD] = _transposed(b, a)
    return _adapter(pairs, adapter.sites[EMBEDDING].scaling, adapter.config.lora_dropout, adapter.origin)


def write(adapter: Adapter, folder: Path, *, tied: bool) -> Adapter:
    """Write an adapter as mlx-lm's folder, atomically; return it as it was written, of one rank and one scaling.

    `tied` says that the base ties its head to the embedding.

    Raises:
        UnsupportedError: with every module that mlx-lm does not adapt.
        AdapterError: the folder cannot be written.
    """
    result = uniform(adapter)
    paths = _paths(result, tied=tied)
    tensors = {
        path + end: tensor if tensor.dtype != torch.float64 else tensor.float()
        for path in paths
        for end, tensor in zip(ENDS, _transposed(*result.pair(path)), strict=True)
    }
    keys = {layer[1] if (layer := LAYER.fullmatch(path)) else path for path in paths}
    site = result.sites[paths[0]]
    table: dict[str, Any] = {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": adapter.config.lora_dropout,
            "keys": sorted(keys),
            "rank": site.r,
            "scale": site.scaling,
        },
        "model": adapter.origin.base_model,
        "num_layers": -1,  # all; those without tensors are left as they are
    }
    try:
        with new_folder(folder) as fresh:
            (fresh / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=2))
            (fresh / MLX_TENSORS).write_bytes(encode((raw(key, tensor) for key, tensor in tensors.items()), {}))
    except OSError as error:
        raise AdapterError(f"{folder} cannot be written: {error.strerror or error}") from error
    return result


def _paths(adapter: Adapter, *, tied: bool) -> list[str]:
    """Return the modules to write, which are those of mlx-lm's models for the usual decoders."""
    hint = "Train it without these modules."
    problems = []
    for path in adapter.sites:
        if any(path.startswith(f"{body}.") for body, _ in PLACES[1:]):
            problems.append(f"{path} is in the language model of a multimodal base")
            hint = "Merge it into its base, with loradeck merge, and convert that model."
        elif path not in (EMBEDDING, HEAD) and not LAYER.fullmatch(path):
            problems.append(f"{path} is not in a layer")
    paths = list(adapter.sites)
    if tied and touches_vocabulary(adapter):
        if _is_tied(adapter):
            paths.remove(HEAD)
        else:
            problems.append("the base ties its head to the embedding, and mlx-lm adapts both alike")
    if problems:
        raise UnsupportedError("mlx-lm cannot take this adapter", problems, hint=hint)
    return paths


def _is_tied(adapter: Adapter) -> bool:
    """Whether the head's update is the embedding's."""
    if not {EMBEDDING, HEAD} <= adapter.sites.keys():
        return False
    (a, b), (head_a, head_b) = adapter.pair(EMBEDDING), adapter.pair(HEAD)
    return torch.equal(head_a, b.T) and torch.equal(head_b, a.T)
