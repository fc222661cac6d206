"""How a base's frozen weights are kept: as they came, packed, or in int8. Knows which modules share one."""

from collections import Counter
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from loradeck.base.prepacked import pack
from loradeck.base.quantised import QuantisedEmbedding, QuantisedLinear, quantised
from loradeck.base.upcast import widen
from loradeck.errors import ConfigError

Weights: TypeAlias = Literal["plain", "packed", "int8"]
CHOICES = get_args(Weights)


def prepare(model: PreTrainedModel, weights: Weights) -> None:
    """Lay out the weights of a model's linear layers for its device, in place and one layer at a time.

    The model must be frozen: what trains, and what is no plain nn.Linear, stays as it is. There is one copy of every
    weight before and after; gradients still go through the layers.

    `packed` keeps every value; results differ by the order of summation (float32: 1e-5 of the largest output, bfloat16:
    its rounding). A weight that two modules share (a tied head) stays plain, for both to read; on other devices than
    the CPU nothing is to be done. Where the CPU only emulates the dtype, what is not packed is multiplied in float32.
    `int8` keeps one byte per weight, of the token embedding and the head too, tied or not, and quantises nothing else;
    the rest of the model, and every adapter, stay in their own precision.

    Raises:
        ConfigError: no such choice, or int8 on a GPU, in float16, or for a model that would keep most of its weights.
    """
    if weights not in CHOICES:
        raise ConfigError(f"weights {weights!r} is no choice", hint=f"Give {', '.join(CHOICES)}.")
    if weights == "packed":
        uses = _uses(model)
        for module in model.modules():
            if _is_frozen(module, nn.Linear) and uses[id(module.weight)] == 1:
                pack(cast("nn.Linear", module))
            if _is_frozen(module, nn.Linear):  # shared, or not to be packed
                widen(cast("nn.Linear", module))
    if weights == "int8":
        _quantise(model)


def _quantise(model: PreTrainedModel) -> None:
    if model.device.type != "cpu" or model.dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"int8 weights are for the CPU, in bfloat16 or float32; this base is in {model.dtype} on {model.device}",
            hint="Give weights='plain', or device='cpu' and another dtype.",
        )
    embedding = model.get_input_embeddings()
    shared: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if _is_frozen(module, nn.Linear) or (module is embedding and _is_lookup(module)):
            shared.setdefault(id(module.weight), []).append(module)
    uses = _uses(model)
    groups = [group for weight, group in shared.items() if uses[weight] == len(group)]
    if 2 * sum(group[0].get_parameter("weight").numel() for group in groups) < model.num_parameters():
        raise ConfigError(
            f"most weights of this {type(model).__name__} are in no nn.Linear, and would not become int8",
            hint="Give weights='packed' or 'plain'.",
        )
    for group in groups:
        weight, scales = quantised(group[0].get_parameter("weight"))
        for module in group:
            module.__class__ = QuantisedLinear if isinstance(module, nn.Linear) else QuantisedEmbedding
            module.weight, module.scales = weight, scales


def _uses(model: nn.Module) -> Counter[int]:
    """Count the modules that hold each parameter, by its id."""
    return Counter(id(each) for module in model.modules() for each in module.parameters(recurse=False))


def _is_frozen(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class, computes as the class does, and does not train."""
    plain = type(module) is kind and "forward" not in vars(module)
    return plain and not any(parameter.requires_grad for parameter in module.parameters())


def _is_lookup(module: nn.Module) -> bool:
    """Whether an embedding does no more than look up and, as in Gemma, scale."""
    kind = type(module) if hasattr(module, "embed_scale") else nn.Embedding
    return isinstance(module, nn.Embedding) and _is_frozen(module, kind) and module.max_norm is None
