"""How far apart the updates of two adapters are. Knows low-rank algebra; never builds a dense update.

D = scaling · B A is what an adapter adds to a module's weight; |·| is the Frobenius norm.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from loradeck.errors import AdapterError
from loradeck.lora.adapter import Adapter
from loradeck.lora.manifest import AdapterFiles

NOISE = 1e-12  # what QR in float64 leaves of a difference of equals
Factors: TypeAlias = tuple[Tensor, Tensor]  # A (r, in), scaling · B (out, r)


def distances(first: AdapterFiles, second: AdapterFiles) -> tuple[dict[str, float], float]:
    """Return |D1 - D2| / |D1| of every module that both adapt, and of all modules as one; what one lacks is zero.

    Raises:
        AdapterError: a module has other shapes in the second adapter, or a tensor is not finite.
    """
    problems = [
        f"{path} has A {site.a_shape} and B {site.b_shape}, and {other.a_shape} and {other.b_shape}"
        for path, site in first.sites.items()
        if (other := second.sites.get(path))
        and (site.a_shape[1:], site.b_shape[0]) != (other.a_shape[1:], other.b_shape[0])
    ]
    if problems:
        raise AdapterError(
            "these adapters are for other bases", problems, hint="`loradeck diff --headers` compares the rest."
        )
    one, two = (Adapter.from_files(listing, check_copy=lambda *_: None) for listing in (first, second))
    each: dict[str, float] = {}
    apart = whole = 0.0
    for path in dict.fromkeys([*one.sites, *two.sites]):
        size, distance = _norms(_factors(one, path), _factors(two, path))
        apart, whole = apart + distance**2, whole + size**2
        if path in one.sites and path in two.sites:
            each[path] = _ratio(distance, size)
    return each, _ratio(math.sqrt(apart), math.sqrt(whole))


def _factors(adapter: Adapter, path: str) -> Factors | None:
    """Return a module's pair; a grouped convolution's B as what it is among all channels, block-diagonal."""
    site = adapter.sites.get(path)
    if site is None:
        return None
    a, b = (tensor.detach().double().flatten(1) for tensor in adapter.pair(path))
    return a, site.scaling * torch.block_diag(*b.chunk(site.r // b.shape[1]))


def _norms(first: Factors | None, second: Factors | None) -> tuple[float, float]:
    """Return |D1| and |D1 - D2|, where None is a D of zero.

    With [B1, -B2] = Q R and [A1; A2]ᵀ = P S the second is |R Sᵀ|, and the first is that of their leading columns. This
    loses no digits to squares, as traces of Gram matrices do.
    """
    pairs = [(a, sign * b) for sign, pair in ((1, first), (-1, second)) if pair for a, b in [pair]]
    s = torch.linalg.qr(torch.cat([a for a, _ in pairs]).T, mode="r").R
    r = torch.linalg.qr(torch.cat([b for _, b in pairs], dim=1), mode="r").R
    lead = first[0].shape[0] if first else 0
    return _norm(r[:, :lead] @ s[:, :lead].T), _norm(r @ s.T)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def _ratio(distance: float, size: float) -> float:
    if size:
        return distance / size if distance > size * NOISE else 0.0
    return math.inf if distance else 0.0
