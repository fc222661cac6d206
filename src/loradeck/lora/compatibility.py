"""Whether an adapter fits a model: its modules, its shapes, its base. Changes nothing."""

import logging
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError
from loradeck.lora import targets, whole_model
from loradeck.lora.manifest import AdapterFiles, TargetModule, copied_module
from loradeck.ops.layer_kinds import LayerKind, dense_weight

log = logging.getLogger(__name__)


def respelling(model: nn.Module, adapted: Mapping[str, LayerKind], files: AdapterFiles) -> Mapping[str, str]:
    """Return how to respell an adapter's modules to fit a model, as {path: path in the model}; nothing if they do.

    They are respelled only if then, and in one way alone, every module is there and every shape fits. `adapted` is as
    in `layer_kinds`.

    Raises:
        AdapterError: as `layer_kinds`, of the spelling that fits best.
    """
    errors: list[AdapterError] = []
    fits: list[Mapping[str, str]] = []
    modules = [*files.sites, *map(copied_module, files.copies)]
    for paths in chain([{}], whole_model.respellings(model, modules)):
        try:
            layer_kinds(model, adapted, files.respelled(paths).sites, str(files.folder))
        except AdapterError as error:
            errors.append(error)
        else:
            if not paths:
                return {}
            fits.append(paths)
    if len(fits) != 1:
        raise min(reversed(errors), key=lambda error: len(error.problems))
    return fits[0]


def layer_kinds(
    model: nn.Module, adapted: Mapping[str, LayerKind], sites: Mapping[str, TargetModule], what: str
) -> dict[str, LayerKind]:
    """Return the kind of each module that an adapter needs; `adapted` are the kinds of modules with adapters.

    Raises:
        AdapterError: with every module that is missing or has other shapes.
    """
    kinds: dict[str, LayerKind] = {}
    problems = []
    closed = targets.closed(model)
    for path, site in sites.items():
        kind = adapted.get(path) or targets.check(model, path, closed)
        if isinstance(kind, str):
            problems.append(f"{path} {whole_model.why_left_out(model, path) or kind}")
        elif kind.name != site.kind:
            problems.append(f"{path} is a {kind.name} layer here, the adapter's is {site.kind}")
        elif kind.shapes(site.r) != (site.a_shape, site.b_shape):
            a, b = kind.shapes(site.r)
            problems.append(f"{path} needs A {a} and B {b} here, the adapter has {site.a_shape} and {site.b_shape}")
        else:
            kinds[path] = kind
    if not sites:
        problems.append("it adapts no module")
    if problems:
        raise AdapterError(
            f"{what} does not fit this base", problems, hint="Load the base it was trained on; nothing was loaded."
        )
    return kinds


def check_base(model: nn.Module, files: AdapterFiles, *, any_base: bool) -> None:
    """Compare the base that an adapter's metadata names with the model's, if both have a fingerprint.

    If they differ and one of them is quantised, it may be the other's: the log warns. The shapes must fit.

    Raises:
        AdapterError: they differ, none of them is quantised, and `any_base` is not set.
    """
    theirs, their_kind = (files.origin.provenance.get(key) for key in ("base_fingerprint", "base_quantisation"))
    ours, our_kind = (vars(model).get(key) for key in ("fingerprint", "base_quantisation"))
    if any_base or not theirs or not isinstance(ours, str) or theirs == ours:
        return
    what = (
        f"{files.folder} was trained on another base: {files.origin.base_model or 'unnamed'}, "
        f"fingerprint {theirs[:12]}{_in(their_kind)}; this one has {ours[:12]}{_in(our_kind)}"
    )
    if their_kind or our_kind:
        log.warning("%s. It is used, since its shapes fit and both may be the same base, quantised differently", what)
    else:
        raise AdapterError(
            what,
            hint="Load that base.",
            python="If you know that this one is compatible, pass any_base=True.",
            cli="If you know that this one is compatible: `loradeck generate`, `chat` and `merge` take --any-base.",
        )


def _in(kind: str | None) -> str:
    return f" in {kind}" if kind else ""


def why_not_a_copy(model: nn.Module, key: str, tensor: Tensor) -> str | None:
    """Return why a tensor of the file is not a copy of a weight of the base, None if it is.

    Of a tensor on the meta device only the shape is compared.
    """
    name = key.rpartition(".")[2]
    try:
        module = model.get_submodule(copied_module(key))
        weight = module.get_parameter(name)
    except AttributeError:
        return "belongs to no weight of this base"
    if not weight.is_floating_point():
        return "repeats a weight that is quantised in this base, so the two cannot be compared"
    weight = dense_weight(module) if name == "weight" else weight
    same = weight.shape == tensor.shape
    if not same or not (tensor.is_meta or torch.equal(weight.detach().cpu(), tensor.to(weight.dtype))):
        return "differs from this base's weight (modules_to_save, or a resized vocabulary): not supported"
    return None
