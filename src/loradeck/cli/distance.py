"""The distance between the updates of two adapters, computed without a dense update.

D = scaling · B A is the update of a module's weight, and of a module that an adapter replaces, all its weights; |·| is
the Frobenius norm.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from loradeck.errors import AdapterError
from loradeck.lora.adapter import Adapter
from loradeck.lora.manifest import AdapterFiles

NOISE = 1e-12  # relative rounding error of QR in float64
Factors: TypeAlias = tuple[Tensor, Tensor]  # A (r, in), scaling · B (out, r)


def distances(first: AdapterFiles, second: AdapterFiles) -> tuple[dict[str, float], float]:
    """Return |D1 - D2| / |D1| of every module that both adapt, and of all modules together; a missing update is zero.

    Raises:
        AdapterError: the shapes of a module differ, or a tensor is not finite.
    """
    problems = [
        f"{path}: A {site.a_shape} and B {site.b_shape}, but {other.a_shape} and {other.b_shape}"
        for path, site in first.sites.items()
        if (other := second.sites.get(path))
        and (site.a_shape[1:], site.b_shape[0]) != (other.a_shape[1:], other.b_shape[0])
    ]
    if problems:
        raise AdapterError(
            "the adapters are for different bases", problems, hint="`loradeck diff --headers` compares the rest."
        )
    one, two = map(_read, (first, second))
    by_module: dict[str, float] = {}
    apart = whole = 0.0
    for path in dict.fromkeys([*one.sites, *two.sites]):
        size, distance = _norms(_factors(one, path), _factors(two, path))
        apart, whole = apart + distance**2, whole + size**2
        if path in one.sites and path in two.sites:
            by_module[path] = _ratio(distance, size)
    for path in dict.fromkeys([*one.saved, *two.saved]):
        size, distance = _norms_of_saved(_weights(one, path), _weights(two, path))
        apart, whole = apart + distance**2, whole + size**2
        if path in one.saved and path in two.saved:
            by_module[path] = _ratio(distance, size)
    return by_module, _ratio(math.sqrt(apart), math.sqrt(whole))


def _read(files: AdapterFiles) -> Adapter:
    """Read an adapter without its base: copies of the base's weights are left out, modules of its own are kept."""
    return Adapter.from_files(files, check_copy=lambda key, _: None if key in files.copies else "is its own")


def _weights(adapter: Adapter, path: str) -> dict[str, Tensor]:
    """Return the weights of a module that an adapter replaces; nothing if it does not."""
    saved = adapter.saved_module(path) if path in adapter.saved else {}
    return {name: tensor.detach().double() for name, tensor in saved.items()}


def _norms_of_saved(first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[float, float]:
    """Return |D1| and |D1 - D2|; weights of different shapes, as of heads with other labels, have nothing in common."""
    size = apart = 0.0
    for name in first.keys() | second.keys():
        one, two = first.get(name), second.get(name)
        size += 0.0 if one is None else float(one.square().sum())
        if one is not None and two is not None and one.shape == two.shape:
            apart += float((one - two).square().sum())
        else:
            apart += sum(float(each.square().sum()) for each in (one, two) if each is not None)
    return math.sqrt(size), math.sqrt(apart)


def _factors(adapter: Adapter, path: str) -> Factors | None:
    """Return a module's A and B; the B of a grouped convolution is block-diagonal over all channels."""
    site = adapter.sites.get(path)
    if site is None:
        return None
    a, b = (tensor.detach().double().flatten(1) for tensor in adapter.pair(path))
    return a, site.scaling * torch.block_diag(*b.chunk(site.r // b.shape[1]))


def _norms(first: Factors | None, second: Factors | None) -> tuple[float, float]:
    """Return |D1| and |D1 - D2|, where None is a D of zero.

    With [B1, -B2] = Q R and [A1; A2]ᵀ = P S, the second is |R Sᵀ| and the first the same of their leading columns.
    Traces of Gram matrices would lose half the digits to squaring.
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
