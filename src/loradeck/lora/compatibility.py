"""Whether an adapter fits a model: its modules, its shapes, its base. Changes nothing."""

import logging
import re
from collections.abc import Container, Mapping, Sequence
from itertools import chain, takewhile

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError, ConfigError
from loradeck.lora import targets, vocabulary, whole_model
from loradeck.lora.folder import CONFIG
from loradeck.lora.manifest import ADAPTED_COPY, AdapterFiles, TargetModule, copied_module, keys_of
from loradeck.lora.peft import unknown_settings
from loradeck.lora.saved_modules import why_not_replaced
from loradeck.lora.unsupported import ANY_BASE
from loradeck.ops.layer_kinds import LayerKind, dense_weight

log = logging.getLogger(__name__)

SHOWN = 5  # modules in a warning
ROWS = 4096  # of a weight that are compared at once


def respelling(model: nn.Module, adapted: Mapping[str, LayerKind], files: AdapterFiles) -> Mapping[str, str]:
    """Return how to respell an adapter's modules to fit a model, as {path: path in the model}; nothing if they do.

    They are respelled only if then, and in one way alone, every module is there and every shape fits. `adapted` is as
    in `layer_kinds`.

    Raises:
        AdapterError: as `layer_kinds`, of the spelling that fits best.
    """
    resizable = vocabulary.modules(model)
    errors: list[AdapterError] = []
    fits: list[Mapping[str, str]] = []
    modules = [*files.sites, *map(copied_module, (*files.copies, *files.saved_keys))]
    for paths in chain([{}], whole_model.respellings(model, modules)):
        try:
            spelled = files.respelled(paths)
            spelled = spelled.with_base_rows(vocabulary.base_rows(resizable, spelled))
            layer_kinds(model, adapted, spelled.sites, str(files.folder), spelled.spellings)
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
    model: nn.Module,
    adapted: Mapping[str, LayerKind],
    sites: Mapping[str, TargetModule],
    what: str,
    spellings: Mapping[str, str] = {},
) -> dict[str, LayerKind]:
    """Return the kind of each module that an adapter needs; `adapted` are the kinds of modules with adapters.

    `spellings` are how the file has keys that it spells another way, for errors.

    Raises:
        AdapterError: with every module that is missing or has other shapes.
    """
    kinds: dict[str, LayerKind] = {}
    problems = []
    without: list[str] = []  # paths of modules that are missing, or take no adapter
    closed = targets.closed(model)
    for path, site in sites.items():
        kind = adapted.get(path) or targets.check(model, path, closed)
        if isinstance(kind, str):
            key = spellings.get(keys_of(path, site)[0])
            reason = whole_model.why_left_out(model, path) or kind
            problems.append(f"{path}{f' ({key} in the file)' if key else ''} {reason}")
            without.append(path)
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
        hint = next(filter(None, (_hint(model, path) for path in without[:1])), "Load the base it was trained on")
        raise AdapterError(f"{what} does not fit this base", problems, hint=f"{hint}; nothing was loaded.")
    return kinds


def _hint(model: nn.Module, path: str) -> str | None:
    """Return what to do about a module that is missing or takes no adapter, None if this seems to be another base."""
    paths = {other for other, _ in model.named_modules()}
    if path in paths:
        return "Train it again without such modules, or merge it into its base with PEFT and use that model"
    experts = re.match(r"(.*\bexperts)\.\d+\.", path)
    if experts and experts[1] in paths:
        return (
            f"{experts[1]} has the weights of all experts in one parameter here, as in transformers 5, and the adapter "
            "a pair for each expert, as in transformers 4: merge it into its base there, and use that model"
        )
    parts = path.split(".")[::-1]
    for other in paths:
        others = other.split(".")[::-1]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False)))
        if same > 1 and not any(part.isdigit() for part in parts[same:] + others[same:]):
            return f"The base has {other}: rename the keys in the file, or load the base whose modules have these paths"
    return None


def check_base(model: nn.Module, files: AdapterFiles, *, any_base: bool) -> None:
    """Compare the base that an adapter's metadata names with the model's, if both have a fingerprint.

    If they differ and one of them is quantised, it may be the other's: the log warns. The shapes must fit.

    Raises:
        AdapterError: they differ, none of them is quantised, and `any_base` is not set.
    """
    theirs, their_kind = (files.origin.provenance.get(key) for key in ("base_fingerprint", "base_quantisation"))
    check_fingerprint(model, str(files.folder), files.origin.base_model, theirs, their_kind, any_base=any_base)


def check_fingerprint(
    model: nn.Module, adapter: str, base: str | None, theirs: str | None, their_kind: str | None, *, any_base: bool
) -> None:
    """Do as `check_base` for an adapter of which only this is known: its name, its base's, and the base's fingerprint.

    `their_kind` is how that base was quantised, if it was.

    Raises:
        AdapterError: as `check_base`.
    """
    ours, our_kind = (vars(model).get(key) for key in ("fingerprint", "base_quantisation"))
    if any_base or not theirs or not isinstance(ours, str) or theirs == ours:
        return
    what = (
        f"{adapter} was trained on another base: {base or 'unnamed'}, "
        f"fingerprint {theirs[:12]}{_in(their_kind)}; this one has {ours[:12]}{_in(our_kind)}"
    )
    if their_kind or our_kind:
        log.warning("%s. It is used, since its shapes fit and both may be the same base, quantised differently", what)
    else:
        raise AdapterError(
            what,
            hint="Load that base.",
            **ANY_BASE,
        )


def _in(kind: str | None) -> str:
    return f" in {kind}" if kind else ""


def lacking(model: nn.Module, files: AdapterFiles) -> list[str]:
    """Return the modules of a model that an adapter's configuration targets and that its file has no tensors for.

    Without target_modules, as in some old files, the configuration does not say.

    Raises:
        AdapterError: matching its regexes takes too long.
    """
    if not files.targets:
        return []
    try:
        return targets.lacking(model, files.config, files.sites)
    except ConfigError as error:
        raise AdapterError(f"{files.folder / CONFIG}: {error.message}", hint=error.hint) from None


def check_saved(model: nn.Module, saved: Mapping[str, Mapping[str, Tensor]], what: str) -> None:
    """Check that modules of these parameters can replace the model's, by path, and bring what the model lacks.

    Raises:
        AdapterError: with every module that is missing or has other parameters.
    """
    brought = {f"{path}.{name}" for path, tensors in saved.items() for name in tensors}
    missing = sorted(vars(model).get("missing_weights", frozenset()) - brought)
    problems = [f"{name} is neither in the base nor in the adapter" for name in missing]
    resizable = [*vocabulary.modules(model).values()] if saved else []
    for path, tensors in saved.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            problems.append(f"{path} is not a module of this base")
        else:
            rows = vocabulary.rows_of(module) if module in resizable else None
            base = {name: tensor[:rows] for name, tensor in tensors.items()}
            problems += [f"{path} {reason}" for reason in why_not_replaced(module, base)]
    if problems:
        hint = "Load the base it was trained on, for its task; nothing was loaded."
        raise AdapterError(f"{what} does not fit this base", problems, hint=hint)


def warn_of_gaps(files: AdapterFiles, paths: Sequence[str]) -> None:
    """Warn of what the files leave open: modules that `lacking` found, and settings that nobody here knows."""
    if paths:
        shown = ", ".join(paths[:SHOWN]) + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
        log.warning(
            "%s has no tensors for %d modules that its %s targets, so they stay as they are in this base: %s",
            files.folder, len(paths), CONFIG, shown,
        )  # fmt: skip
    if unknown := unknown_settings(files.origin.written or {}):
        log.warning("%s has unknown settings, which are ignored: %s", files.folder / CONFIG, ", ".join(unknown)[:200])


def untrained_copies(files: AdapterFiles) -> list[str]:
    """Return the keys of copies that PEFT saves of modules which the adapter adapts or whose rows were resized."""
    return [key for key in files.copies if key.endswith(ADAPTED_COPY) or copied_module(key) in files.base_rows]


def why_not_a_copy(model: nn.Module, key: str, tensor: Tensor, *, any_values: Container[str] = ()) -> str | None:
    """Return why a tensor of the file is not a copy of a weight of the base, None if it is one up to rounding.

    Of a tensor on the meta device only the shape is compared. Those of the keys `any_values` may have other values: the
    log says how far.
    """
    name = key.rpartition(".")[2]
    try:
        module = model.get_submodule(copied_module(key))
        weight = module.get_parameter(name)
    except AttributeError:
        return "belongs to no weight of this base"
    weight = dense_weight(module) if name == "weight" else weight
    if weight.is_floating_point():
        if weight.shape != tensor.shape:
            return why_other_shape(weight, tensor)
        reason = why_other_values(weight, tensor)
    else:
        reason = "repeats a weight that another tool has quantised in this base, so the two cannot be compared"
    if not reason or key not in any_values:
        return reason
    if not tensor.is_meta:
        log.warning("%s %s; the base's own weight is used", key, reason)
    return None


def why_other_shape(weight: Tensor, tensor: Tensor) -> str | None:
    """Return why a tensor of this shape is no copy of a weight, None if the shapes are the same."""
    if weight.shape == tensor.shape:
        return None
    ours, theirs = (tuple(each.shape) for each in (weight, tensor))
    return f"differs from this base's weight: it is {theirs}, not {ours} (modules_to_save, or a resized vocabulary)"


def why_other_values(weight: Tensor, tensor: Tensor) -> str | None:
    """Return how far a tensor is from a weight of its shape, None if no farther than rounding or on the meta device."""
    if tensor.is_meta:
        return None
    limits = [torch.finfo(each.dtype) for each in (weight, tensor)]
    relative = max(limit.eps for limit in limits)
    absolute = max(limit.eps * limit.smallest_normal for limit in limits)
    largest = farthest = 0.0
    same = True
    for ours, theirs in zip(weight.detach().split(ROWS), tensor.split(ROWS), strict=True):
        size = ours.to("cpu", torch.float32).abs()
        distance = (ours.to("cpu", torch.float32) - theirs.to("cpu", torch.float32)).abs().nan_to_num(torch.inf)
        same = same and bool((distance <= relative * size + absolute).all())
        largest, farthest = max(largest, float(size.max())), max(farthest, float(distance.max()))
    if same:
        return None
    return (
        f"differs from this base's weight by up to {farthest:.2g}, where its largest is {largest:.2g} "
        "(modules_to_save, bias, or another base)"
    )
