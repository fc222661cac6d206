"""The formats of a base's frozen weights (plain, packed, blocks, int8, int4), and models that share them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loradeck.base.blocked import MIXTURE, block, block_experts
from loradeck.base.fingerprint import sample
from loradeck.base.frozen import upcast
from loradeck.base.prepacked import pack
from loradeck.base.quantised import QuantisedWeight, set_weight, why_not_quantised
from loradeck.base.quantiser import quantise
from loradeck.errors import ConfigError
from loradeck.native.quantised import KINDS
from loradeck.native.quantised import pack as pack_quantised

Weights: TypeAlias = Literal["plain", "packed", "blocks", "int8", "int4"]
CHOICES = get_args(Weights)
QUANTISED: Mapping[str, str] = {"int8": "Q8_0", "int4": "Q4_1"}
"""How weights are quantised, by the choice."""
M = TypeVar("M", bound=nn.Module)


def prepare(model: PreTrainedModel, weights: Weights) -> None:
    """Convert the weights of a model's linear layers to a format, in place and one layer at a time.

    The model must be frozen: modules that train, and those that are not plain nn.Linear, stay as they are. There is one
    copy of every weight before and after; gradients still flow through the layers.

    - `packed` keeps every value; results differ only by the order of summation (float32: 1e-5 of the largest output,
      bfloat16: its rounding). A weight that two modules share (a tied head) stays plain, and so do all on a GPU. On a
      CPU that only emulates the dtype, layers that are not packed compute in float32.
    - `blocks` is `packed` for serving: the layout that the compiled step reads (`loradeck.native`), also for experts.
      Training's backward is slower with it.
    - `int8` stores the linear layers, the token embedding and the head, tied or not, in one byte per weight, with a
      scale for 32 of them (llama.cpp's Q8_0). The rest of the model, and every adapter, stays in its own precision.
    - `int4` stores them in half a byte, with a scale and a low value for 32 of them (Q4_1), found by least squares.

    Raises:
        ConfigError: unknown `weights`; int8 or int4 on a GPU or in float16; a model most of whose weights they would
            skip.
        BaseModelError: a weight that they would store is not finite.
    """
    if weights not in CHOICES:
        raise ConfigError(f"invalid weights {weights!r}", hint=f"Use one of {', '.join(CHOICES)}.")
    if weights in ("packed", "blocks"):
        uses = _uses(model)
        for lay_out in (block, pack) if weights == "blocks" else (pack,):  # what blocks cannot hold is packed
            for module in model.modules():
                if _is_frozen(module, nn.Linear) and uses[id(module.weight)] == 1:
                    lay_out(cast("nn.Linear", module))
        for module in model.modules():
            experts = module._modules.get("experts")
            # Beside a shared expert, for one, the step does not know them, and modules compute faster with plain ones.
            if weights == "blocks" and experts and {*module._modules} <= MIXTURE and _is_frozen(experts, type(experts)):
                block_experts(experts)
            if _is_frozen(module, nn.Linear):  # if it was not packed
                upcast(cast("nn.Linear", module))
    if weights in QUANTISED:
        check_quantised(weights, model.dtype, model.device)
        for path, layers in quantisable(model, weights).items():
            set_quantised(layers, layers[0].weight, weights, path)


def shared_copy(model: M) -> M:
    """Return a copy of a model's modules and settings that shares all its tensors, so weights take no more memory."""
    tensors: dict[int, Any] = {
        id(tensor): tensor
        for module in model.modules()
        for attributes in (vars(module), module._parameters, module._buffers)
        for tensor in attributes.values()
        if isinstance(tensor, Tensor)
    }
    return deepcopy(model, tensors)


def check_quantised(weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse to quantise weights of a dtype on a device where nothing computes with them.

    Raises:
        ConfigError: as `prepare`.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(
            f"{weights} weights need a CPU and bfloat16 or float32; this base is in {dtype} on {device}",
            hint="Use plain weights, or bfloat16 or float32 on a CPU.",
        )
    if reason := why_not_quantised():
        raise ConfigError(f"weights cannot be quantised here: {reason}", hint="Use plain or packed weights.")


def quantisable(model: PreTrainedModel, weights: Weights) -> Mapping[str, Sequence[nn.Linear | nn.Embedding]]:
    """Return the layers whose weights are quantised, by the path of the weight, which they may share.

    The model is frozen; its weights need no memory.

    Raises:
        ConfigError: most weights of the model would stay plain.
    """
    embedding = model.get_input_embeddings()
    uses, inputs = _uses(model), KINDS[QUANTISED[weights]].inputs
    layers: dict[str, list[Any]] = {}
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    for module in model.modules():
        if _is_frozen(module, nn.Linear) or (module is embedding and _is_lookup(module)):
            layers.setdefault(paths[id(module.weight)], []).append(module)
    whole = {
        path: group
        for path, group in layers.items()
        if uses[id(group[0].weight)] == len(group) and group[0].weight.shape[1] % inputs == 0
    }
    if 2 * sum(group[0].weight.numel() for group in whole.values()) < model.num_parameters():
        raise ConfigError(
            f"most weights of this {type(model).__name__} are outside nn.Linear and would not become {weights}",
            hint="Use packed or plain weights.",
        )
    return whole


def set_quantised(layers: Iterable[nn.Linear | nn.Embedding], plain: Tensor, weights: Weights, path: str) -> None:
    """Give layers, which share it, a weight that is made from a plain one (O, I).

    Raises:
        BaseModelError: the weight is not finite, or too large for the format.
    """
    kind = KINDS[QUANTISED[weights]]
    weight = QuantisedWeight(pack_quantised(quantise(plain, kind.name, path), kind, plain.shape[1]), sample(plain))
    for layer in layers:
        set_weight(layer, weight, plain.dtype)


def _uses(model: nn.Module) -> Counter[int]:
    """Count the modules that hold each parameter, by its id."""
    return Counter(id(each) for module in model.modules() for each in module.parameters(recurse=False))


def _is_frozen(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module has exactly this class, the class's own forward, and no parameter that trains."""
    plain = type(module) is kind and "forward" not in vars(module)
    return plain and not any(parameter.requires_grad for parameter in module.parameters())


def _is_lookup(module: nn.Module) -> bool:
    """Whether an embedding only looks rows up and, as in Gemma, scales them."""
    kind = type(module) if hasattr(module, "embed_scale") else nn.Embedding
    return isinstance(module, nn.Embedding) and _is_frozen(module, kind) and module.max_norm is None
