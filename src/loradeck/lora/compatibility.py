"""Whether an adapter fits a model: its modules, its shapes, its base. Knows no bank and changes nothing."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError
from loradeck.lora import targets
from loradeck.lora.manifest import PREFIX, AdapterFiles, TargetModule
from loradeck.ops.layer_kinds import Form


def forms(model: nn.Module, known: Mapping[str, Form], sites: Mapping[str, TargetModule], what: str) -> dict[str, Form]:
    """Return how each module meets the adapter; `known` are the modules that have adapters already.

    Raises:
        AdapterError: with every module that is missing or has other shapes.
    """
    found: dict[str, Form] = {}
    problems = []
    closed = targets.closed(model)
    for path, site in sites.items():
        form = known.get(path) or targets.check(model, path, closed)
        if isinstance(form, str):
            problems.append(f"{path} {form}")
        elif form.kind != site.kind:
            problems.append(f"{path} is a {form.kind} layer here, the adapter's is {site.kind}")
        elif form.shapes(site.r) != (site.a_shape, site.b_shape):
            a, b = form.shapes(site.r)
            problems.append(f"{path} needs A {a} and B {b} here, the adapter has {site.a_shape} and {site.b_shape}")
        else:
            found[path] = form
    if not sites:
        problems.append("it adapts no module")
    if problems:
        raise AdapterError(
            f"{what} does not fit this base", problems, hint="Load the base it was trained on; nothing was loaded."
        )
    return found


def check_base(model: nn.Module, listing: AdapterFiles, *, any_base: bool) -> None:
    """Refuse an adapter whose record names another base than the model does, where both say.

    Raises:
        AdapterError: the fingerprints differ and `any_base` is not set.
    """
    trained_on: str | None = listing.origin.provenance.get("base_fingerprint")
    here: object = getattr(model, "fingerprint", None)
    if trained_on and isinstance(here, str) and trained_on != here and not any_base:
        raise AdapterError(
            f"{listing.folder} was trained on another base: {listing.origin.base_model or 'unnamed'}, "
            f"fingerprint {trained_on[:12]}; this one has {here[:12]}",
            hint="Load that base, or pass any_base=True if you know that this one will do.",
        )


def copy_problem(model: nn.Module, key: str, tensor: Tensor) -> str | None:
    """Say what is wrong with a tensor of the file that repeats a weight of the base; None if it is the same."""
    path = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    try:
        own = model.get_parameter(path)
    except AttributeError:
        return "belongs to no weight of this base"
    if not own.is_floating_point():
        return "repeats a weight of which this base holds a quantised form, so the two cannot be compared"
    own = own.to_dense() if own.is_mkldnn else own  # packed for the CPU's kernels, every value kept
    same = own.shape == tensor.shape
    if not same or not (tensor.is_meta or torch.equal(own.detach().cpu(), tensor.to(own.dtype))):
        return "is a weight of its own, other than this base's (modules_to_save, or a grown vocabulary): not supported"
    return None
