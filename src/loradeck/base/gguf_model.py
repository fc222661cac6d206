"""A transformers model with the weights of a GGUF file, in the file's own blocks or de-quantised."""

import math
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from loradeck.base.gguf_config import LONGROPE
from loradeck.base.gguf_file import HINT, GgufFile, GgufTensor, decode
from loradeck.base.quantised import QuantisedWeight, set_weight, why_not_quantised
from loradeck.errors import BaseModelError
from loradeck.llamacpp import FACTORS, GEMMA, Architecture, names
from loradeck.native.quantised import KINDS, pack

FLOATS = ("F32", "F16", "BF16")
IN_CONFIG = frozenset({FACTORS, *LONGROPE})  # tensors that the configuration has


def why_not_in_blocks(file: GgufFile) -> str | None:
    """Return why a file's blocks cannot be kept, or None if they can."""
    others = sorted({tensor.type.name for tensor in file.tensors.values()} - {*KINDS, *FLOATS})
    return f"it has tensors of type {', '.join(others)}" if others else why_not_quantised()


def read_model(file: GgufFile, config: PretrainedConfig, dtype: torch.dtype, *, in_blocks: bool) -> PreTrainedModel:
    """Return the model of a file. Nothing refers to the file afterwards.

    With `in_blocks`, linear layers and the embedding have the file's blocks, packed once. Everything else is in
    `dtype`: what the file has in plain floats, norms and biases.

    Raises:
        BaseModelError: tensors are missing, have other shapes or no place, or the file changed meanwhile.
    """
    model, architecture = _skeleton(file, config, dtype)
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    memory = file.memory()
    tensors = _tensors(file, model, architecture)
    for path, tensor in sorted(tensors.items(), key=lambda item: (item[1].part, item[1].offset)):  # as they lie
        rows = file.read(tensor, memory).view(-1, tensor.row)
        order = architecture.file_rows(tensor.name, tensor.shape[0])
        modules = owners[id(model.get_parameter(path))]
        kind = KINDS.get(tensor.type.name)
        if in_blocks and kind and all(isinstance(module, nn.Linear | nn.Embedding) for module in modules):
            quantised = QuantisedWeight(pack(rows, kind, tensor.shape[-1], order))
            for module in modules:
                set_weight(cast("nn.Linear | nn.Embedding", module), quantised, dtype)
            continue
        values = decode(tensor.type, rows).view(tensor.shape)
        if architecture.name in GEMMA and tensor.name.endswith("norm.weight"):
            values = values - 1
        weight = nn.Parameter((values if order is None else values[order]).to(dtype), requires_grad=False)
        for module in modules:
            module.register_parameter(path.rpartition(".")[2], weight)
    file.check_unchanged()
    return model


def _skeleton(file: GgufFile, config: PretrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, Architecture]:
    """Return a model whose parameters have no memory yet, and its architecture in llama.cpp."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name.endswith(".weight")}
    name, heads = file.settings["general.architecture"], config.num_attention_heads
    architecture = Architecture(name, heads, config.num_key_value_heads, shapes)
    if architecture.blocks != config.num_hidden_layers:
        raise BaseModelError(
            f"{file.path} says that it has {config.num_hidden_layers} layers, and has {architecture.blocks}", hint=HINT
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():  # buffers that no file has, such as RoPE's frequencies
        if buffers := dict(module.named_buffers(recurse=False)):
            for key, buffer in buffers.items():
                module._buffers[key] = torch.full_like(buffer, math.nan, device="cpu")  # would be seen
            model._init_weights(module)
    return model, architecture


def _tensors(file: GgufFile, model: PreTrainedModel, architecture: Architecture) -> dict[str, GgufTensor]:
    """Return the tensor of each parameter, by the parameter's path.

    Raises:
        BaseModelError: with every tensor that is missing, has another shape, or no place.
    """
    table = names(architecture.name, architecture.blocks)
    # A tied weight is there once, as the embedding's.
    paths = {path: table.get_name(path, try_suffixes=(".weight", ".bias")) for path, _ in model.named_parameters()}
    tensors: dict[str, GgufTensor] = {}
    problems = [f"{name} has no place" for name in file.tensors if name not in IN_CONFIG | {*paths.values()}]
    for path, name in paths.items():
        tensor, shape = file.tensors.get(name or ""), tuple(model.get_parameter(path).shape)
        if tensor is None:
            problems.append(f"{name} is missing, for {path}")
        elif tensor.shape != shape:
            problems.append(f"{name} is {tensor.shape}, not {shape} as {path}")
        else:
            tensors[path] = tensor
    if problems:
        kind = type(model).__name__
        raise BaseModelError(f"{file.path} does not have the tensors of its {kind}", problems, hint=HINT)
    return tensors
