"""A second model on the same weights, so that what is done to one's modules leaves the other alone. Knows no LoRA."""

from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def shared_copy(model: M) -> M:
    """Return a copy of a model's modules and settings that shares every one of its tensors: no memory for weights."""
    shared: dict[int, Any] = {
        id(tensor): tensor
        for module in model.modules()
        for place in (vars(module), module._parameters, module._buffers)
        for tensor in place.values()
        if isinstance(tensor, Tensor)
    }
    return deepcopy(model, shared)
