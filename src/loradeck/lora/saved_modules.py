"""Modules that an adapter replaces by its own, as the head of a classifier (PEFT's modules_to_save)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from loradeck.errors import RouteError
from loradeck.ops.layer_kinds import dense_weight
from loradeck.ops.mapping import AdapterWeights, LoraMapping

Tensors = Mapping[str, nn.Parameter]
"""The parameters of a module by their names in it."""
NO_LABEL = -torch.inf  # the logit of a label that an adapter's head does not have


def why_not_replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps these tensors from replacing a module's. One linear layer may have other outputs."""
    shapes = _shapes(module)
    problems = [f"has no {name}" for name in sorted(shapes.keys() - tensors.keys())]
    problems += [f"has {name}, which this base has not" for name in sorted(tensors.keys() - shapes.keys())]
    other = sorted(name for name in shapes.keys() & tensors.keys() if shapes[name] != tensors[name].shape)
    layers = {(name.rpartition(".")[0], tensors[name].shape[:1]) for name in other}
    same_inputs = all(_is_linear(module, name) and shapes[name][1:] == tensors[name].shape[1:] for name in other)
    if len(layers) > 1 or not same_inputs:
        problems += [f"has {name} {[*tensors[name].shape]}, not {[*shapes[name]]}" for name in other]
    return problems


def replacement(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Return a copy of a module with these parameters, and copies of its buffers. Its linear layers are plain ones."""
    memo: dict[int, Any] = {id(parameter): tensors[name] for name, parameter in module.named_parameters()}
    for path, part in module.named_modules():
        memo[id(vars(part).get("forward"))] = None  # of an adapter's layer, which is the original's
        if isinstance(part, nn.Linear):
            memo[id(part)] = _linear({name: tensors.get(f"{path}.{name}".lstrip(".")) for name in ("weight", "bias")})
    copy = deepcopy(module, memo)
    for part in copy.modules():
        vars(part).pop("forward", None)
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
    for name, shape in _shapes(module).items():
        path, _, kind = name.rpartition(".")
        part = module.get_submodule(path)
        value = (dense_weight(part) if kind == "weight" else part.get_parameter(kind)).detach()
        new = name in missing
        if outputs is not None and path == last and shape[0] != outputs:
            value, new = value.new_zeros(outputs, *shape[1:]), True
        dtype = torch.promote_types(value.dtype, torch.float32)
        value = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if new and value.dim() > 1:
            value.normal_(std=std, generator=generator)
        parameters[name] = value
    return parameters


def is_replaced(mapping: LoraMapping, modules: Sequence[object | None]) -> bool:
    """Return whether any row goes through a replacement."""
    return any(modules[index] is not None for entry in mapping.entries for index, _ in entry)


Output = Callable[[Tensor, Tensor, Tensor, AdapterWeights], Tensor]
"""The outputs of rows of one entry, from those with the entry's pairs, the base's alone, the inputs, and the entry."""


def outputs_of(
    y: Tensor,
    base: Tensor,
    x: Tensor,
    mapping: LoraMapping,
    modules: Sequence[object | None],
    output: Output,
    *,
    packed: bool,
) -> Tensor:
    """Return a module's outputs for the inputs x (rows, …), with `output` for the rows of adapters that replace it.

    y are the outputs with all pairs, `base` those of the base alone. Where outputs differ in their number, the missing
    ones are -inf. In a packed row (1, tokens, …) tokens stand for rows.
    """
    if packed:
        mixed = _outputs(y.flatten(0, 1), base.flatten(0, 1), x.flatten(0, 1), mapping, modules, output)
        return mixed.unflatten(0, y.shape[:2])
    return _outputs(y, base, x, mapping, modules, output)


def _outputs(
    y: Tensor, base: Tensor, x: Tensor, mapping: LoraMapping, modules: Sequence[object | None], output: Output
) -> Tensor:
    times = len(x) // mapping.total
    groups: dict[AdapterWeights, list[Tensor]] = {}
    start = 0
    for entry, length in zip(mapping.entries, mapping.lengths, strict=True):
        stop = start + length * times
        if any(modules[index] is not None for index, _ in entry):
            groups.setdefault(entry, []).append(torch.arange(start, stop, device=x.device))
        start = stop
    parts = {}
    for entry, spans in groups.items():
        rows = torch.cat(spans)
        parts[entry] = rows, output(y[rows], base[rows], x[rows], entry)
    width = max(y.shape[-1], *(part.shape[-1] for _, part in parts.values()))
    if width == y.shape[-1]:
        mixed = y.clone()
    else:
        mixed = torch.cat([y, y.new_full((*y.shape[:-1], width - y.shape[-1]), NO_LABEL)], -1)
    for rows, part in parts.values():
        mixed[rows] = torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=NO_LABEL).to(y.dtype)
    return mixed


def replaced_output(
    y: Tensor, base: Tensor, x: Tensor, entry: AdapterWeights, modules: Sequence[object | None]
) -> Tensor:
    """Return the output of one adapter's module at weight 1; of a blend, y + Σ weight · (replacement - base).

    Raises:
        RouteError: a blend of heads with different numbers of outputs.
    """
    replaced = [(module, weight) for index, weight in entry if isinstance(module := modules[index], nn.Module)]
    if len(entry) == 1 and entry[0][1] == 1:
        return computed(replaced[0][0], x)
    total = y
    for module, weight in replaced:
        part = computed(module, x)
        if part.shape != y.shape:
            raise RouteError(
                f"heads of {part.shape[-1]} and {y.shape[-1]} outputs cannot be blended",
                hint="Route each row through one adapter, at weight 1.",
            )
        total = total + weight * (part - base)
    return total


def computed(module: nn.Module, x: Tensor) -> Tensor:
    """Compute a replacement in its own dtype, which need not be the base's."""
    dtype = next(module.parameters()).dtype
    return module(x.to(dtype) if x.is_floating_point() else x)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a module's parameters; a base's layers may store their weights in another form."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for path, part in module.named_modules():
        name = f"{path}.weight".lstrip(".")
        if isinstance(part, nn.Linear):
            shapes[name] = torch.Size((part.out_features, part.in_features))
        elif isinstance(part, nn.Embedding):
            shapes[name] = torch.Size((part.num_embeddings, part.embedding_dim))
    return shapes


def _linear(tensors: Mapping[str, nn.Parameter | None]) -> nn.Linear:
    weight, bias = tensors["weight"], tensors["bias"]
    assert weight is not None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.register_parameter("weight", weight)
    linear.register_parameter("bias", bias)
    return linear


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Linear)
