"""A transformers model with the weights of a GGUF file, in the file's own blocks or de-quantised."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from loradeck.base.fingerprint import Sample, fingerprint_of, sample
from loradeck.base.gguf_config import LONGROPE
from loradeck.base.gguf_file import HINT, GgufFile, GgufTensor, decode
from loradeck.errors import BaseModelError
from loradeck.llamacpp import FACTORS, GEMMA, Architecture, names

IN_CONFIG = frozenset({FACTORS, *LONGROPE})  # tensors that the configuration has


def read_model(
    file: GgufFile, config: PretrainedConfig, dtype: torch.dtype, *, in_blocks: bool
) -> tuple[PreTrainedModel, str]:
    """Return a file's model, frozen and in eval mode, and its fingerprint.

    With `in_blocks`, linear layers and the embedding hold the file's blocks, packed once; what the file has in plain
    floats, norms and biases, and all else without it, is in `dtype`. Nothing refers to the file afterwards.

    Raises:
        BaseModelError: tensors are missing, have other shapes or no place, or the file changed meanwhile.
    """
    from accelerate import init_empty_weights

    layers = config.num_hidden_layers
    shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name.endswith(".weight")}
    name = file.settings["general.architecture"]
    architecture = Architecture(name, config.num_attention_heads, config.num_key_value_heads, shapes)
    if architecture.blocks != layers:
        raise BaseModelError(f"{file.path} has {architecture.blocks} layers, and says {layers}", hint=HINT)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    model.requires_grad_(False).eval()
    tensors = _tensors(file, model, architecture)
    modules: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            modules.setdefault(id(parameter), []).append(module)
    memory = file.memory()
    samples: dict[str, Sample] = {}
    for path, tensor in sorted(tensors.items(), key=lambda item: (item[1].part, item[1].offset)):
        data = file.read(tensor, memory)
        owners = modules[id(model.get_parameter(path))]
        order = architecture.file_rows(tensor.name, tensor.shape[0])
        value = decode(tensor.type, data.view(-1, tensor.row)).view(tensor.shape)
        if name in GEMMA and tensor.name.endswith("norm.weight"):
            value = value - 1
        value = (value if order is None else value[order]).to(dtype)
        for module in owners:
            module.register_parameter(path.rpartition(".")[2], nn.Parameter(value, requires_grad=False))
        samples[path] = sample(value)
    file.check_unchanged()
    return model, fingerprint_of(type(model).__name__, sorted(samples.items()))


def _tensors(file: GgufFile, model: PreTrainedModel, architecture: Architecture) -> dict[str, GgufTensor]:
    """Return the tensor of each parameter, by the parameter's path.

    Raises:
        BaseModelError: with every tensor that is missing, has another shape, or no place.
    """
    table = names(architecture.name, architecture.blocks)
    tensors: dict[str, GgufTensor] = {}
    problems: list[str] = []
    for path, parameter in model.named_parameters():  # a tied weight appears once, as the embedding
        name = table.get_name(path, try_suffixes=(".weight", ".bias"))
        tensor = file.tensors.get(name or "")
        if tensor is None:
            problems.append(f"{name or path} is missing" + (f" ({path})" if name else ""))
        elif tensor.shape != tuple(parameter.shape):
            problems.append(f"{name} is {tensor.shape}, not {tuple(parameter.shape)} ({path})")
        else:
            tensors[path] = tensor
    known = IN_CONFIG | {table.get_name(path, try_suffixes=(".weight", ".bias")) for path, _ in model.named_parameters()}
    problems += [f"{name} has no place" for name in file.tensors if name not in known]
    if problems:
        raise BaseModelError(f"the tensors of {file.path} are not those of its {type(model).__name__}", problems, hint=HINT)
    return tensors
