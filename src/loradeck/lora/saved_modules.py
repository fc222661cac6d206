"""Modules that an adapter replaces by its own, as the head of a classifier (PEFT's modules_to_save)."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from loradeck.errors import RouteError
from loradeck.ops.mapping import AdapterWeights, LoraMapping

Tensors = Mapping[str, nn.Parameter]
"""The parameters of a module by their names in it."""
NO_LABEL = -torch.inf  # the logit of a label that an adapter's head does not have


def why_not_replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps these tensors from replacing a module's. The last linear layer may have other outputs."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    problems = [f"has no {name}" for name in sorted(shapes.keys() - tensors.keys())]
    problems += [f"has {name}, which this base has not" for name in sorted(tensors.keys() - shapes.keys())]
    other = [name for name in shapes.keys() & tensors.keys() if shapes[name] != tensors[name].shape]
    outputs = {
        (tensors[name].shape[0], name.rpartition(".")[0])
        for name in other
        if _is_linear(module, name) and tensors[name].dim() and tensors[name].shape[1:] == shapes[name][1:]
    }
    if len(outputs) > 1 or any((tensors[name].shape[:1] or (0,))[0] not in dict(outputs) for name in other):
        problems += [f"has {name} {[*tensors[name].shape]}, not {[*shapes[name]]}" for name in sorted(other)]
    return problems


def replacement(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Return a copy of a module with these parameters; its buffers are copies of the module's."""
    memo: dict[int, Any] = {id(parameter): tensors[name] for name, parameter in module.named_parameters()}
    for part in module.modules():  # a copy calls its own class, and no adapter's layer
        memo[id(vars(part).get("forward"))] = None
    copy = deepcopy(module, memo)
    for part in copy.modules():
        vars(part).pop("forward", None)
        if isinstance(part, nn.Linear):
            part.out_features = len(part.weight)
    return copy


def initial(
    module: nn.Module, outputs: int | None, std: float, missing: Collection[str], generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Return the first parameters of a module's replacement: the module's own, in float32 or wider.

    The last linear layer is new if it gets another number of outputs; so is what the base is `missing`: weights are
    normal with this standard deviation, biases zero, as in transformers.
    """
    last = next(iter([path for path, part in module.named_modules() if isinstance(part, nn.Linear)][::-1]), None)
    parameters = {}
    for name, parameter in module.named_parameters():
        value = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)).clone()
        if outputs is not None and name.rpartition(".")[0] == last and len(value) != outputs:
            value, new = value.new_zeros(outputs, *value.shape[1:]), True
        else:
            new = name in missing
        if new and value.dim() > 1:
            value.normal_(std=std, generator=generator)
        parameters[name] = value
    return parameters


def outputs_of(
    y: Tensor, x: Tensor, mapping: LoraMapping, modules: Sequence[nn.Module | None], *, packed: bool
) -> Tensor:
    """Return a module's outputs y for the inputs x (rows, …), with those of the rows' replacements in their places.

    A row of one adapter at weight 1 gets its replacement's output; a blend gets y + Σ weight · (replacement − y). Where
    outputs differ in their number, the missing ones are -inf. In a packed row (1, tokens, …) tokens stand for rows.

    Raises:
        RouteError: a blend of heads with different numbers of outputs.
    """
    if packed:
        mixed = _outputs(y.flatten(0, 1), x.flatten(0, 1), mapping, modules)
        return mixed.unflatten(0, y.shape[:2])
    return _outputs(y, x, mapping, modules)


def _outputs(y: Tensor, x: Tensor, mapping: LoraMapping, modules: Sequence[nn.Module | None]) -> Tensor:
    times = len(x) // mapping.total
    groups: dict[AdapterWeights, list[Tensor]] = {}
    start = 0
    for entry, length in zip(mapping.entries, mapping.lengths, strict=True):
        stop = start + length * times
        if any(modules[index] is not None for index, _ in entry):
            groups.setdefault(entry, []).append(torch.arange(start, stop, device=x.device))
        start = stop
    if not groups:
        return y
    parts = {}
    for entry, spans in groups.items():
        rows = torch.cat(spans)
        parts[entry] = rows, _output(y[rows], x[rows], entry, modules)
    width = max(y.shape[-1], *(part.shape[-1] for _, part in parts.values()))
    if width == y.shape[-1]:
        mixed = y.clone()
    else:
        mixed = torch.cat([y, y.new_full((*y.shape[:-1], width - y.shape[-1]), NO_LABEL)], -1)
    for rows, part in parts.values():
        mixed[rows] = torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=NO_LABEL).to(y.dtype)
    return mixed


def _output(y: Tensor, x: Tensor, entry: AdapterWeights, modules: Sequence[nn.Module | None]) -> Tensor:
    replaced = [(module, weight) for index, weight in entry if (module := modules[index]) is not None]
    if len(entry) == 1 and entry[0][1] == 1:
        return replaced[0][0](x)
    total = y
    for module, weight in replaced:
        part = module(x)
        if part.shape != y.shape:
            raise RouteError(
                f"heads of {part.shape[-1]} and {y.shape[-1]} outputs cannot be blended",
                hint="Route each row through one adapter, at weight 1.",
            )
        total = total + weight * (part - y)
    return total


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Linear)
