"""Merging adapters into the base's weights, and undoing it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError, UnsupportedError
from loradeck.lora import vocabulary
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
    that an adapter replaces gets W + Σ weight · (W_a − W), or with one adapter at weight 1 that one's parameters. The
    embedding and the head get the rows for tokens that all adapters add.

    Raises:
        UnsupportedError: a weight is not a plain floating-point tensor, or a grouped convolution's; an added token has
            no row in the head.
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
            members = [pair for pair in weighted if path in pair[0].saved]
            merged |= _replaced(model, path, members, len(weighted), merged)
        merged |= _resized(model, merged, weighted)
    originals = {path: model.get_parameter(path) for path in merged}
    unfold(model, merged)
    return originals


def unfold(model: nn.Module, originals: Mapping[str, nn.Parameter]) -> None:
    """Restore the base's own parameters."""
    for path, parameter in originals.items():
        module, _, name = path.rpartition(".")
        part = model.get_submodule(module)
        setattr(part, name, parameter)
        if name == "weight":
            _count_rows(model, module, part, parameter)


def _count_rows(model: nn.Module, path: str, module: nn.Module, weight: nn.Parameter) -> None:
    """Let a layer and the model's configuration say how many outputs or tokens there are, if a weight changes it."""
    config: Any = getattr(model, "config", None)
    if isinstance(module, nn.Embedding) and path in vocabulary.modules(model):
        module.num_embeddings = len(dense_weight(module))
        if config is not None:
            config.get_text_config().vocab_size = module.num_embeddings
    # A base may store weights in other forms, which do not show how many outputs there are.
    plain = isinstance(module, nn.Linear) and weight.shape[1:] == (module.in_features,)
    if plain and type(weight) is nn.Parameter and module.out_features != len(weight):
        module.out_features = len(weight)
        if config is not None and path not in vocabulary.modules(model):  # a classifier's head
            config.num_labels = len(weight)


def _resized(
    model: nn.Module, merged: Mapping[str, nn.Parameter], weighted: Sequence[tuple[Adapter, float]]
) -> dict[str, nn.Parameter]:
    """Return the weights of the embedding and of the head, with the base's part as merged, and with added tokens."""
    parts = vocabulary.merged_rows(vocabulary.modules(model), weighted)
    counts = {len(rows) for tensors in parts.values() for rows in tensors.values()}
    if len(counts) > 1 or (counts and parts.keys() != vocabulary.modules(model).keys()):
        raise UnsupportedError(
            "cannot merge: tokens that the adapter adds have rows of the embedding, and none of the head",
            hint="Use it by a route instead of merging.",
        )
    resized: dict[str, nn.Parameter] = {}
    sources: dict[str, Tensor] = {}
    for path, tensors in parts.items():
        module = model.get_submodule(path)
        for name, rows in tensors.items():
            base = dense_weight(module) if name == "weight" else module.get_parameter(name)
            first = merged.get(f"{path}.{name}", base)[: len(base)]
            total = torch.cat([first, rows.to(first)])
            twin = next((other for other, source in sources.items() if source is base and name == "weight"), None)
            if twin is not None and torch.equal(resized[twin], total):
                resized[f"{path}.{name}"] = resized[twin]  # a head that is tied stays so
                continue
            sources[f"{path}.{name}"] = base
            resized[f"{path}.{name}"] = nn.Parameter(total, requires_grad=base.requires_grad)
    return resized


def _replaced(
    model: nn.Module,
    path: str,
    weighted: Sequence[tuple[Adapter, float]],
    adapters: int,
    merged: Mapping[str, nn.Parameter],
) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that some of so many adapters replace; `merged` has the others' pairs."""
    parameters: dict[str, nn.Parameter] = {}
    for name in weighted[0][0].saved[path]:
        part, _, kind = f"{path}.{name}".rpartition(".")
        module = model.get_submodule(part)
        base = dense_weight(module) if kind == "weight" else module.get_parameter(kind)
        values = [(adapter.saved_module(path)[name].to(base.device), weight) for adapter, weight in weighted]
        if path in vocabulary.modules(model):  # rows for added tokens: see _resized
            values = [(value[: len(base)], weight) for value, weight in values]
        if len(values) == adapters == 1 and values[0][1] == 1:
            total = values[0][0].to(base.dtype)
        elif any(value.shape != base.shape for value, _ in values):
            raise UnsupportedError(
                f"cannot merge into {path}: heads with different numbers of labels have no blend",
                hint="Merge one adapter, at weight 1.",
            )
        else:
            wide = torch.promote_types(base.dtype, torch.float32)
            first = merged.get(f"{path}.{name}", base).to(wide)
            total = sum((w * (value.to(wide) - base.to(wide)) for value, w in values), first).to(base.dtype)
        parameters[f"{path}.{name}"] = nn.Parameter(total.clone(), requires_grad=base.requires_grad)
    return parameters
