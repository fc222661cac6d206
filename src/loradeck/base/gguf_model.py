"""A transformers model with the weights of a GGUF file, in the file's own blocks or de-quantised."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from loradeck.base.gguf_config import LONGROPE
from loradeck.base.gguf_file import HINT, GgufFile, GgufTensor, decode
from loradeck.base.quantised import why_not_quantised
from loradeck.base.skeleton import Skeleton
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
    architecture = _architecture(file, config)
    skeleton = Skeleton(config, dtype)
    memory = file.memory()
    tensors = _tensors(file, skeleton, architecture)
    for path, tensor in sorted(tensors.items(), key=lambda item: (item[1].part, item[1].offset)):  # as they lie
        rows = file.read(tensor, memory).view(-1, tensor.row)
        order = architecture.file_rows(tensor.name, tensor.shape[0])
        kind = KINDS.get(tensor.type.name)
        if in_blocks and kind and skeleton.takes_quantised(path):
            skeleton.set(path, pack(rows, kind, tensor.shape[-1], order))
            continue
        values = decode(tensor.type, rows).view(tensor.shape)
        if architecture.name in GEMMA and tensor.name.endswith("norm.weight"):
            values = values - 1
        skeleton.set(path, values if order is None else values[order])
    file.check_unchanged()
    return skeleton.model


def _architecture(file: GgufFile, config: PretrainedConfig) -> Architecture:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name.endswith(".weight")}
    name, heads = file.settings["general.architecture"], config.num_attention_heads
    architecture = Architecture(name, heads, config.num_key_value_heads, shapes)
    if architecture.blocks != config.num_hidden_layers:
        raise BaseModelError(
            f"{file.path} says that it has {config.num_hidden_layers} layers, and has {architecture.blocks}", hint=HINT
        )
    return architecture


def _tensors(file: GgufFile, skeleton: Skeleton, architecture: Architecture) -> dict[str, GgufTensor]:
    """Return the tensor of each parameter, by the parameter's path.

    Raises:
        BaseModelError: with every tensor that is missing, has another shape, or no place.
    """
    table = names(architecture.name, architecture.blocks)
    paths = {path: table.get_name(path, try_suffixes=(".weight", ".bias")) for path in skeleton.shapes}
    tensors: dict[str, GgufTensor] = {}
    problems = [f"{name} has no place" for name in file.tensors if name not in IN_CONFIG | {*paths.values()}]
    for path, name in paths.items():
        tensor, shape = file.tensors.get(name or ""), tuple(skeleton.shapes[path])
        if tensor is None:
            problems.append(f"{name} is missing, for {path}")
        elif tensor.shape != shape:
            problems.append(f"{name} is {tensor.shape}, not {shape} as {path}")
        else:
            tensors[path] = tensor
    if problems:
        kind = type(skeleton.model).__name__
        raise BaseModelError(f"{file.path} does not have the tensors of its {kind}", problems, hint=HINT)
    return tensors
