"""Merging adapters into the base's weights, and undoing it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError, UnsupportedError
from loradeck.lora.adapter import Adapter
from loradeck.ops.layer_kinds import LayerKind, dense_weight


def merged_weight(weight: Tensor, kind: LayerKind, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """W + Σ factor · B A, summed in float32 or wider and rounded once to the weight's dtype.

    weight in its module's layout · pairs (A, B, factor).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    for a, b, factor in pairs:
        total = total + factor * kind.delta(a.to(wide), b.to(wide))
    return total.to(weight.dtype)


def fold(
    model: nn.Module, kinds: Mapping[str, LayerKind], weighted: Iterable[tuple[Adapter, float]]
) -> dict[str, nn.Parameter]:
    """Replace weights by merged ones and return the base's own parameters by their paths.

    A merged module gets a new parameter; the old one, which may be tied to another module, is not written to. A module
    that an adapter replaces gets W + Σ weight · (W_a − W), or with one adapter at weight 1 that one's parameters.

    Raises:
        UnsupportedError: a weight is not a plain floating-point tensor, or a grouped convolution's.
        AdapterError: the merged weights are not finite. Nothing has changed in either case.
    """
    weighted = list(weighted)
    merged: dict[str, nn.Parameter] = {}
    with torch.inference_mode(False), torch.no_grad():
        for path in dict.fromkeys(path for adapter, _ in weighted for path in adapter.sites):
            module = model.get_submodule(path)
            weight: Any = module.weight
            dense = dense_weight(module)
            if type(dense) not in (nn.Parameter, Tensor) or not dense.is_floating_point():
                raise UnsupportedError(
                    f"cannot merge into {path}: its weight is a {type(weight).__name__} of {weight.dtype}",
                    hint="Merge into a base loaded in float32, bfloat16 or float16.",
                )
            pairs = [
                (*adapter.pair(path), weight_ * adapter.sites[path].scaling)
                for adapter, weight_ in weighted
                if path in adapter.sites
            ]
            try:
                total = merged_weight(dense, kinds[path], pairs)
            except ValueError as error:
                raise UnsupportedError(f"{path}: {error}", hint="Use it by a route instead of merging.") from error
            if not bool(torch.isfinite(total).all()):
                raise AdapterError(
                    f"{path} would hold NaN or Inf after merging", hint="Check the adapter and its weight."
                )
            merged[f"{path}.weight"] = nn.Parameter(total.contiguous(), requires_grad=weight.requires_grad)
        for path in dict.fromkeys(path for adapter, _ in weighted for path in adapter.saved):
            merged |= _replaced(model, path, [pair for pair in weighted if path in pair[0].saved], len(weighted))
    originals = {path: model.get_parameter(path) for path in merged}
    unfold(model, merged)
    return originals


def unfold(model: nn.Module, originals: Mapping[str, nn.Parameter]) -> None:
    """Restore the base's own parameters."""
    for path, parameter in originals.items():
        module, _, name = path.rpartition(".")
        part = model.get_submodule(module)
        setattr(part, name, parameter)
        # A base may store weights in other forms, which do not show how many outputs there are.
        plain = isinstance(part, nn.Linear) and name == "weight" and parameter.shape[1:] == (part.in_features,)
        if plain and type(parameter) is nn.Parameter and part.out_features != len(parameter):
            part.out_features = len(parameter)
            config: Any = getattr(model, "config", None)
            if config is not None:  # a classifier's head is the only layer whose outputs change
                config.num_labels = len(parameter)


def _replaced(
    model: nn.Module, path: str, weighted: Sequence[tuple[Adapter, float]], adapters: int
) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that some of so many adapters replace."""
    parameters: dict[str, nn.Parameter] = {}
    for name in weighted[0][0].saved[path]:
        part, _, kind = f"{path}.{name}".rpartition(".")
        module = model.get_submodule(part)
        base = dense_weight(module) if kind == "weight" else module.get_parameter(kind)
        values = [(adapter.saved_module(path)[name].to(base.device), weight) for adapter, weight in weighted]
        if len(values) == adapters == 1 and values[0][1] == 1:
            total = values[0][0].to(base.dtype)
        elif any(value.shape != base.shape for value, _ in values):
            raise UnsupportedError(
                f"cannot merge into {path}: heads with different numbers of labels have no blend",
                hint="Merge one adapter, at weight 1.",
            )
        else:
            wide = torch.promote_types(base.dtype, torch.float32)
            total = sum((w * (value.to(wide) - base.to(wide)) for value, w in values), base.to(wide)).to(base.dtype)
        parameters[f"{path}.{name}"] = nn.Parameter(total.clone(), requires_grad=base.requires_grad)
    return parameters
