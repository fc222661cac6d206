"""A transformers model that gets its weights one at a time, each as it is or quantised."""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from loradeck.base.quantised import QuantisedWeight, set_weight
from loradeck.native.quantised import Quantised


class Skeleton:
    """A causal language model whose parameters have no memory until they are set.

    Attributes:
        model: it is whole when each path of `shapes` is set.
        shapes: of each parameter; one that modules share is there once.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        """`dtype`: what the model computes in."""
        self.dtype = dtype
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for module in self.model.modules():  # buffers that no file has, such as RoPE's frequencies
            if buffers := dict(module.named_buffers(recurse=False)):
                for key, buffer in buffers.items():
                    module._buffers[key] = torch.full_like(buffer, math.nan, device="cpu")  # would be seen
                self.model._init_weights(module)
        self.shapes: Mapping[str, torch.Size] = {path: each.shape for path, each in self.model.named_parameters()}
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {path: [] for path in self.shapes}
        paths = {id(parameter): path for path, parameter in self.model.named_parameters()}
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                self._owners[paths[id(parameter)]].append((module, name))

    def takes_quantised(self, path: str) -> bool:
        """Whether a parameter may be quantised: it is the weight of linear layers, or of embeddings that look up."""
        return all(
            name == "weight" and isinstance(module, nn.Linear | nn.Embedding) for module, name in self._owners[path]
        )

    def set(self, path: str, value: Tensor | Quantised) -> None:
        """Set a parameter, in all modules that share it; a tensor is brought to the model's dtype."""
        if isinstance(value, Quantised):
            weight = QuantisedWeight(value)
            for module, _ in self._owners[path]:
                set_weight(cast("nn.Linear | nn.Embedding", module), weight, self.dtype)
            return
        parameter = nn.Parameter(value.to(self.dtype), requires_grad=False)
        for module, name in self._owners[path]:
            module.register_parameter(name, parameter)
