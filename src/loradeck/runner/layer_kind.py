"""Which layers of a decoder compute the same function of their weights, so that one of them is enough to try."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loradeck.base.quantised import QuantisedWeight

NUMBER = "layer_idx"  # a layer's place in the decoder
NUMBERED = ("", "self_attn")  # paths of modules whose number `observe` takes away
LEFT_OUT = ("_parameters", "_modules", "_non_persistent_buffers_set")
PLAIN = (bool, int, float, str, type, torch.dtype)


def kind_of(layer: nn.Module) -> Mapping[str, object]:
    """Return what a layer computes with: equal for two layers that differ in the values of their parameters alone.

    It consists of each module's class, its attributes and the formats of its parameters. Attributes that cannot be
    compared are equal only if they are the same object. The layer's number is left out: see `Observation.uses_number`.
    """
    modules = layer.named_modules(remove_duplicate=False)
    return {path: (type(module), _attributes(path, module), _parameters(module)) for path, module in modules}


def _attributes(path: str, module: nn.Module) -> Mapping[str, object]:
    left_out = {*LEFT_OUT, *([NUMBER] if path in NUMBERED else [])}
    return {name: _value(value) for name, value in vars(module).items() if name not in left_out}


def _parameters(module: nn.Module) -> Mapping[str, object]:
    return {name: None if each is None else _format(each) for name, each in module._parameters.items()}


def _format(parameter: Tensor) -> tuple[object, ...]:
    quantised = parameter.quantised.kind.name if isinstance(parameter, QuantisedWeight) else None
    return type(parameter), parameter.shape, parameter.dtype, quantised


def _value(value: Any) -> object:
    """Return a value to compare instead of another: that of objects which cannot be compared is their id."""
    if value is None or isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, dict):
        return type(value), {key: _value(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value), [_value(each) for each in value]
    if isinstance(value, partial):
        return partial, _value(value.func), _value(value.args), _value(value.keywords)
    return id(value)
