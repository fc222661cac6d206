"""Combine several adapters into a new one.

For weights w_i and updates D_i = scaling_i · B_i A_i, the target is D = Σ w_i D_i, per module:

    concat  D exactly, at the sum of the ranks: A = [A_1; A_2; …], B = [w_1 s_1 B_1, w_2 s_2 B_2, …]
    svd     the best D of rank r (Eckart-Young), from the small factors: D = (Q_b R_b)(Q_a R_a)ᵀ, svd of R_b R_aᵀ
    ties    trim each w_i D_i to its largest share `density`, elect a sign per value, average those that agree
            (arXiv:2306.01708), then the best rank r of the result
    dare    drop each value of D_i with probability 1 - density, divide the rest by density, sum (arXiv:2311.03099),
            then the best rank r

ties and dare are defined on the values of D_i, so they build one module's D at a time; concat and svd never build D.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from sys import float_info
from typing import Literal

import torch
from torch import Tensor

from loradeck.errors import AdapterError, ConfigError, UnsupportedError
from loradeck.lora.adapter import Adapter
from loradeck.lora.config import MAX_RANK
from loradeck.lora.manifest import TargetModule, config_of
from loradeck.lora.peft import Origin
from loradeck.ops.weights import finite

Method = Literal["concat", "svd", "ties", "dare"]
METHODS: tuple[Method, ...] = ("concat", "svd", "ties", "dare")


@dataclass(frozen=True, slots=True)
class Combination:
    """A new adapter, and its relative error ‖D - BA‖ / ‖D‖ from lowering the rank (Frobenius).

    `error` is that of all modules together, `errors` that of each.
    """

    adapter: Adapter
    error: float
    errors: Mapping[str, float]


def combine(
    weighted: Sequence[tuple[Adapter, float]],
    *,
    method: Method = "concat",
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Combination:
    """Combine several adapters, each at a weight.

    Args:
        weighted: the adapters and their weights.
        method: see the top of this module.
        r: the rank of the result; by default the sum of the ranks for concat, their maximum otherwise.
        density: the share of values that ties and dare keep, 0 < density <= 1.
        seed: for dare.

    Raises:
        ConfigError: an unknown method, an invalid rank, density or weight, or a rank for concat.
        AdapterError: an adapter has NaN or Inf, or the result overflows.
    """
    _check(weighted, method, r, density)
    generator = torch.Generator().manual_seed(seed)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    sites: dict[str, TargetModule] = {}
    errors: dict[str, float] = {}
    lost = whole = 0.0
    with torch.inference_mode(False), torch.no_grad():
        for path in dict.fromkeys(path for adapter, _ in weighted for path in adapter.sites):
            parts = [(adapter, weight) for adapter, weight in weighted if path in adapter.sites]
            site = parts[0][0].sites[path]
            factors = [_factors(adapter, path, weight) for adapter, weight in parts]
            dtype = parts[0][0].pair(path)[0].dtype
            if method == "concat":
                a, b = torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)
            else:
                rank = r or max(a.shape[0] for a, _ in factors)
                if method == "svd":
                    a, b, dropped, total = _best_rank(*_stacked(factors), rank)
                else:
                    dense = (_ties if method == "ties" else _dare)([b @ a for a, b in factors], density, generator)
                    a, b, dropped, total = best_rank(dense, rank)
                lost, whole = lost + dropped, whole + total
                errors[path] = _share(dropped, total)
            a = a.reshape(-1, *site.a_shape[1:]).to(dtype)
            b = b.reshape(*site.b_shape[:1], -1, *site.b_shape[2:]).to(dtype)
            if not (finite(a) and finite(b)):
                raise AdapterError(f"{path} overflows {dtype}", hint="Combine at smaller weights, or in float32.")
            pairs[path] = a.contiguous(), b.contiguous()  # as files have them: other strides round differently
            sites[path] = TargetModule(site.kind, a.shape[0], 1.0, tuple(a.shape), tuple(b.shape))
    origin = Origin(weighted[0][0].origin.base_model, task_type=weighted[0][0].origin.task_type)
    adapter = Adapter.with_sites(config_of(sites), sites, pairs, origin=origin)
    adapter.fan_in_fan_out = weighted[0][0].fan_in_fan_out
    return Combination(adapter, _share(lost, whole), errors)


def lower_rank(adapter: Adapter, r: int) -> Combination:
    """Return the adapter with each rank above r lowered to r by svd; modules of lower ranks stay as they are.

    Raises:
        ConfigError, AdapterError: as `combine`.
    """
    low = combine([(adapter, 1.0)], method="svd", r=r)
    low_enough = {path: site for path, site in adapter.sites.items() if site.r <= r}
    sites = {path: low_enough.get(path, low.adapter.sites[path]) for path in adapter.sites}
    pairs = {path: (adapter if path in low_enough else low.adapter).pair(path) for path in adapter.sites}
    lowered = Adapter.with_sites(config_of(sites), sites, pairs, origin=replace(adapter.origin, written=None))
    lowered.fan_in_fan_out = adapter.fan_in_fan_out
    return replace(low, adapter=lowered)


def _share(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0


def _check(weighted: Sequence[tuple[Adapter, float]], method: str, r: int | None, density: float) -> None:
    if not weighted:
        raise ConfigError("no adapters to combine", hint='Give adapters and weights: {"a": 0.7, "b": 0.3}.')
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", hint=f"Use one of {', '.join(METHODS)}.")
    if method == "concat" and r is not None:
        raise ConfigError("concat keeps every rank, so it takes no r", hint="The method svd lowers the rank.")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= MAX_RANK):
        raise ConfigError(f"r is {r}, not an integer from 1 to {MAX_RANK}")
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density}, not 0 < density <= 1")
    for adapter, weight in weighted:
        if adapter.saved:
            raise UnsupportedError(
                f"an adapter replaces {', '.join(adapter.saved)}: such modules cannot be combined",
                hint="Route a blend instead.",
            )
        if adapter.added:
            raise UnsupportedError(
                "an adapter has tokens that its base has not: such adapters cannot be combined",
                hint="Route a blend instead.",
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) <= float_info.max:
            raise ConfigError(f"invalid weight {repr(weight)[:40]}", hint="A weight is a finite number.")
        problems = [f"{key} holds NaN or Inf" for key, tensor in adapter.tensors() if not finite(tensor)]
        if problems:
            raise AdapterError("Cannot combine this adapter", problems, hint="Train it again, or leave it out.")
        for path, site in adapter.sites.items():
            if site.kind == "conv" and site.b_shape[1] != site.r:
                raise ConfigError(f"cannot combine {path}, a grouped convolution", hint="Route a blend instead.")
            for other, _ in weighted:
                same = other.sites.get(path)
                if same and (same.kind, same.a_shape[1:], same.b_shape[0]) != (
                    site.kind,
                    site.a_shape[1:],
                    site.b_shape[0],
                ):
                    raise ConfigError(
                        f"{path} has other shapes in another adapter", hint="Combine adapters of one base."
                    )


def _factors(adapter: Adapter, path: str, weight: float) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and w · scaling · B (out, r), in float32 or wider."""
    a, b = adapter.pair(path)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.detach().to(wide).flatten(1), weight * adapter.sites[path].scaling * b.detach().to(wide).flatten(1)


def _stacked(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)


def _best_rank(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best A, B of rank r for b @ a, with the squared norms of the loss and of the whole."""
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    return (
        *_halves(q_b @ u[:, : len(s)], s, v[: len(s)] @ q_a.T, r),
        float(s[r:].square().sum()),
        float(s.square().sum()),
    )


def best_rank(dense: Tensor, r: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best A, B of rank r for a matrix, of equal norms; the squared norms of the loss and of the whole."""
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    return *_halves(u, s, v, r), float(s[r:].square().sum()), float(s.square().sum())


def _halves(u: Tensor, s: Tensor, v: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Split u s v at rank r into A (r, in) and B (out, r) of equal norm; ranks beyond those of u are zero."""
    root = s[:r].sqrt()
    a, b = root[:, None] * v[:r], u[:, :r] * root
    missing = r - len(root)
    if missing > 0:
        a, b = torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return a, b


def _ties(updates: list[Tensor], density: float, _: torch.Generator) -> Tensor:
    trimmed = []
    for update in updates:
        count = max(1, round(density * update.numel()))
        threshold = update.abs().flatten().kthvalue(update.numel() - count + 1).values
        trimmed.append(torch.where(update.abs() >= threshold, update, 0.0))
    stack = torch.stack(trimmed)
    agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def _dare(updates: list[Tensor], density: float, generator: torch.Generator) -> Tensor:
    total = torch.zeros_like(updates[0])
    for update in updates:
        keep = torch.empty(update.shape, dtype=update.dtype).bernoulli_(density, generator=generator)
        total += update * keep.to(update.device) / density
    return total
