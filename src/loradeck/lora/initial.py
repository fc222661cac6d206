"""The first values of adapters that began with a part of their base's weight W (out, in), at scaling s:

    PiSSA   s B A = the best rank r of W             arXiv:2404.02948
    OLoRA   B, A = the first r of Q, R, with QR = W  arXiv:2406.01775

Training went on from W - s B A, so on W itself the trained adapter is too much by these. PEFT keeps neither.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError, UnsupportedError
from loradeck.lora.adapter import Adapter
from loradeck.lora.combine import best_rank, combine
from loradeck.lora.unsupported import BASE_CHANGED
from loradeck.ops.layer_kinds import dense_weight, kind_of

KNOWN = ("pissa", "olora")  # init_lora_weights whose first values follow from the base's weights
REASONS: Mapping[str, str] = {
    "pissa": "began with a randomised SVD, whose random numbers are not in the folder",
    "corda": "began with statistics of data that are not in the folder",
    "lora_ga": "began with gradients on data that are not in the folder",
}


def changed_base(written: Mapping[str, object] | None) -> str | None:
    """Return the init_lora_weights of a config if it changed the base, None if not."""
    name = str((written or {}).get("init_lora_weights")).lower()
    return name if name.startswith(BASE_CHANGED) else None


def check(name: str, *, given: bool) -> None:
    """Check that an adapter can be made plain: from the base's weights, or as its first values are `given`.

    Raises:
        UnsupportedError: it cannot.
    """
    if name.startswith("loftq"):
        raise UnsupportedError(
            "LoftQ trains on quantised weights, whose difference from the base's is of full rank: no plain LoRA has it",
            hint="It is a plain LoRA of those weights: use them as the base, and set init_lora_weights in "
            "adapter_config.json to true.",
        )
    if name not in KNOWN and not given:
        reason = next(reason for start, reason in REASONS.items() if name.startswith(start))
        raise UnsupportedError(
            f"an adapter of init_lora_weights={name} {reason}",
            hint="Give the adapter as it was saved before training.",
            python="Pass initial=FOLDER.",
            cli="Add --initial FOLDER.",
        )


def first_values(adapter: Adapter, name: str, model: nn.Module) -> Adapter:
    """Compute the values that an adapter began with from its base.

    Embeddings begin as those of any LoRA, whose update is zero: they are left out.

    Raises:
        UnsupportedError: a weight cannot be decomposed as PEFT did.
    """
    shared = [id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    problems = []
    for path, site in adapter.sites.items():
        if site.kind == "embedding":
            continue
        module = model.get_submodule(path)
        weight = dense_weight(module)
        turned = bool(getattr(kind_of(module), "fan_in_fan_out", False))
        if site.kind != "linear" or (turned and name == "olora"):
            problems.append(f"{path} is a {type(module).__name__}")
        elif shared.count(id(weight)) > 1:
            problems.append(f"{path} shares its weight, which changed in the other module too")
        elif site.scaling <= 0:
            problems.append(f"{path} has a scaling of {site.scaling:g}")
        else:
            wide = weight.detach().float().cpu()
            pairs[path] = _pair(name, wide.T if turned else wide, site.r, site.scaling)
    if problems:
        raise UnsupportedError(f"{name} cannot be undone for every module", problems)
    return Adapter.with_sites(adapter.config, {path: adapter.sites[path] for path in pairs}, pairs)


def _pair(name: str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    if name == "pissa":
        return best_rank(weight / scaling, r)[:2]
    q, upper = torch.linalg.qr(weight)
    return upper[:r].contiguous(), q[:, :r].contiguous()


def subtract(adapter: Adapter, first: Adapter) -> Adapter:
    """Return the plain LoRA B A - B_0 A_0, in float32 and of up to twice the rank.

    Raises:
        AdapterError: the first values are not those of this adapter.
    """
    paths = first.sites.keys() | {path for path, site in adapter.sites.items() if site.kind != "embedding"}
    problems = [
        f"{path} differs in rank, scaling or shape"
        for path in sorted(paths)
        if adapter.sites.get(path) != first.sites.get(path)
    ]
    if problems:
        raise AdapterError("the first values are those of another adapter", problems, hint="Give this adapter's own.")
    wide, first = adapter.copy(trainable=True), first.copy(trainable=True)
    result = combine([(wide, 1.0), (first, -1.0)], method="concat").adapter
    result.origin = replace(adapter.origin, written=None)
    return result
