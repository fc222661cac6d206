"""Folding adapters into the base's weights and taking them out again. Knows weights; knows no files."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError, UnsupportedError
from loradeck.lora.adapter import Adapter
from loradeck.ops.layer_kinds import Form


def merged_weight(weight: Tensor, form: Form, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """W + Σ factor · B A, summed in float32 or wider and rounded once to the weight's dtype.

    weight in its module's layout · pairs (A, B, factor).
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    for a, b, factor in pairs:
        total = total + factor * form.delta(a.to(wide), b.to(wide))
    return total.to(weight.dtype)


def fold(
    model: nn.Module, forms: Mapping[str, Form], weighted: Iterable[tuple[Adapter, float]]
) -> dict[str, nn.Parameter]:
    """Put merged weights in place and return the base's own parameters by module path, untouched.

    A merged module gets a new parameter; the old one, which may be tied to another module, is only set aside.

    Raises:
        UnsupportedError: a weight is no plain floating-point tensor, or a grouped convolution.
        AdapterError: the merged weights are not finite. In both cases nothing has changed.
    """
    weighted = list(weighted)
    merged: dict[str, nn.Parameter] = {}
    with torch.inference_mode(False), torch.no_grad():
        for path in dict.fromkeys(path for adapter, _ in weighted for path in adapter.sites):
            weight = model.get_submodule(path).weight
            if weight.is_mkldnn:  # packed for the CPU's kernels, every value kept
                weight = nn.Parameter(weight.to_dense(), requires_grad=False)  # type: ignore[operator]
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                raise UnsupportedError(
                    f"{path} has a {type(weight).__name__} of {weight.dtype}, which cannot be merged into",
                    hint="Merge into a base loaded in float32, bfloat16 or float16.",
                )
            pairs = [
                (*adapter.pair(path), weight_ * adapter.sites[path].scaling)
                for adapter, weight_ in weighted
                if path in adapter.sites
            ]
            try:
                fresh = merged_weight(weight, forms[path], pairs)
            except ValueError as error:
                raise UnsupportedError(f"{path}: {error}", hint="Use it by a route instead of merging.") from error
            if not bool(torch.isfinite(fresh).all()):
                raise AdapterError(
                    f"{path} would hold NaN or Inf after merging", hint="Check the adapter and its weight."
                )
            merged[path] = nn.Parameter(fresh, requires_grad=weight.requires_grad)
    own: dict[str, nn.Parameter] = {}
    for path, parameter in merged.items():
        module = model.get_submodule(path)
        own[path] = module.weight  # type: ignore[assignment]
        module.weight = parameter
    return own


def unfold(model: nn.Module, own: Mapping[str, nn.Parameter]) -> None:
    """Put the base's own parameters back."""
    for path, parameter in own.items():
        model.get_submodule(path).weight = parameter
