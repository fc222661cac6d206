"""How the updates of two adapters differ, computed without a dense update.

D = scaling · B A is the update of a module's weight, and of a module that an adapter replaces, all its weights; |·| is
the Frobenius norm, and ⟨·, ·⟩ its inner product.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from loradeck.errors import AdapterError
from loradeck.lora.adapter import Adapter
from loradeck.lora.manifest import AdapterFiles

NOISE = 1e-12  # relative rounding error of QR in float64
CHUNK = 1 << 22  # values of a replaced module's weights that are float64 at once
Factors: TypeAlias = tuple[Tensor, Tensor]  # A (r, in), scaling · B (out, r)


@dataclass(frozen=True, slots=True)
class ModuleDistance:
    """How the updates D1 and D2 of one module differ; a missing update is zero."""

    path: str
    norms: tuple[float, float]
    """|D1| and |D2|."""
    apart: float
    """|D1 - D2|."""
    product: float
    """⟨D1, D2⟩; 0 if the two have other shapes, as have heads with other labels."""
    shared: bool
    """Whether both adapters have an update."""

    @property
    def distance(self) -> float:
        """|D1 - D2| / |D1|; infinite if only D2 is not zero."""
        return _ratio(self.apart, self.norms[0])

    @property
    def similarity(self) -> float | None:
        """The cosine of D1 and D2; None if one of them is zero."""
        one, two = self.norms
        return min(1.0, max(-1.0, self.product / one / two)) if one and two else None


def compare(first: AdapterFiles, second: AdapterFiles) -> list[ModuleDistance]:
    """Compare two adapters module by module, those of the first in its order, then those that only the second has.

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
            "the adapters are for different bases", problems, cli="`loradeck diff --headers` compares the rest."
        )
    one, two = map(_read, (first, second))
    paths, saved = dict.fromkeys([*one.sites, *two.sites]), dict.fromkeys([*one.saved, *two.saved])
    return [
        *(_of_factors(path, _factors(one, path), _factors(two, path)) for path in paths),
        *(_of_saved(path, _weights(one, path), _weights(two, path)) for path in saved),
    ]


def overall(modules: Sequence[ModuleDistance]) -> float:
    """Return |D1 - D2| / |D1| of all modules together; infinite if only D2 is not zero."""
    apart, whole = [module.apart for module in modules], [module.norms[0] for module in modules]
    return _ratio(math.hypot(*apart), math.hypot(*whole))


def _read(files: AdapterFiles) -> Adapter:
    """Read an adapter without its base: copies of the base's weights are left out, modules of its own are kept."""
    return Adapter.from_files(files, check_copy=lambda key, _: None if key in files.copies else "is its own")


def _weights(adapter: Adapter, path: str) -> dict[str, Tensor]:
    """Return the weights of a module that an adapter replaces; nothing if it does not."""
    saved = adapter.saved_module(path) if path in adapter.saved else {}
    return {name: tensor.detach() for name, tensor in saved.items()}


def _of_saved(path: str, first: dict[str, Tensor], second: dict[str, Tensor]) -> ModuleDistance:
    one = two = apart = product = 0.0  # squares
    for name in first.keys() | second.keys():
        a, b = first.get(name), second.get(name)
        if a is not None and b is not None and a.shape == b.shape:
            for x, y in zip(a.flatten().split(CHUNK), b.flatten().split(CHUNK), strict=True):
                x, y = x.double(), y.double()
                one, two = one + float(x @ x), two + float(y @ y)
                apart, product = apart + float((x - y).square().sum()), product + float(x @ y)
        else:
            squares = [0.0 if each is None else _square(each) for each in (a, b)]
            one, two, apart = one + squares[0], two + squares[1], apart + sum(squares)
    norms = math.sqrt(one), math.sqrt(two)
    return ModuleDistance(path, norms, math.sqrt(apart), product, shared=bool(first and second))


def _square(tensor: Tensor) -> float:
    return sum(float(part.double().square().sum()) for part in tensor.flatten().split(CHUNK))


def _factors(adapter: Adapter, path: str) -> Factors | None:
    """Return a module's A and B; the B of a grouped convolution is block-diagonal over all channels."""
    site = adapter.sites.get(path)
    if site is None:
        return None
    a, b = (tensor.detach().double().flatten(1) for tensor in adapter.pair(path))
    return a, site.scaling * torch.block_diag(*b.chunk(site.r // b.shape[1]))


def _of_factors(path: str, first: Factors | None, second: Factors | None) -> ModuleDistance:
    """Compare two updates, where None is a D of zero.

    With [B1, -B2] = Q R and [A1; A2]ᵀ = P S, D1 - D2 = Q R Sᵀ Pᵀ, and D1 and -D2 are the same of the leading and of
    the other columns of R and S. Q and P change no norm and no inner product. Traces of Gram matrices would lose half
    the digits to squaring.
    """
    pairs = [(a, sign * b) for sign, pair in ((1, first), (-1, second)) if pair for a, b in [pair]]
    s = torch.linalg.qr(torch.cat([a for a, _ in pairs]).T, mode="r").R
    r = torch.linalg.qr(torch.cat([b for _, b in pairs], dim=1), mode="r").R
    lead = first[0].shape[0] if first else 0
    one, two = r[:, :lead] @ s[:, :lead].T, -r[:, lead:] @ s[:, lead:].T
    return ModuleDistance(
        path, (_norm(one), _norm(two)), _norm(r @ s.T), float((one * two).sum()), shared=bool(first and second)
    )


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def _ratio(distance: float, size: float) -> float:
    if size:
        return distance / size if distance > size * NOISE else 0.0
    return math.inf if distance else 0.0
