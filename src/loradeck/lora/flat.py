"""Where a frozen adapter's weights lie: its tensors of a dtype are one flat tensor, each A and B a part of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from loradeck.lora.manifest import TargetModule, keys_of
from loradeck.lora.memo import Memo
from loradeck.ops.weights import dtype_code

Span = tuple[str, int, int]  # (name of the flat tensor, start, stop), in elements


@dataclass(frozen=True, eq=False)
class FlatLayout:
    """Where all pairs lie, as arrays; the addresses of an adapter are its flat tensors' plus these offsets.

    P adapted modules. Adapters whose files have the same layout share one.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    """Of the flat tensors."""
    flats: Tensor
    """(P, 2) int64: the flat tensors of A and of B."""
    offsets: Tensor
    """(P, 2) int64: the elements before them."""
    ranks: Tensor
    """(P,) int64."""
    scaling: Tensor
    """(P,) float32."""

    @classmethod
    def of(cls, spans: Mapping[str, Span], sites: Mapping[str, TargetModule]) -> Self:
        """Return the layout of tensors that lie at these spans, by their keys."""
        names = tuple(dict.fromkeys(name for name, _, _ in spans.values()))
        pairs = [[spans[key] for key in keys_of(path, site)] for path, site in sites.items()]
        with torch.inference_mode(False):
            return cls(
                tuple(sites),
                names,
                torch.tensor([[names.index(name) for name, _, _ in pair] for pair in pairs]),
                torch.tensor([[start for _, start, _ in pair] for pair in pairs]),
                torch.tensor([site.r for site in sites.values()]),
                torch.tensor([site.scaling for site in sites.values()], dtype=torch.float32),
            )

    def addresses(self, tensors: Mapping[str, Tensor | None]) -> Tensor | None:
        """Return the rows (P, 4) of an address table for flat tensors of these names.

        None where kernels cannot read the weights by address: their dtype is none that they know, or A's is not B's.
        """
        flats = [flat for name in self.names if (flat := tensors[name]) is not None]
        codes = [dtype_code(flat.dtype, flat.device) for flat in flats]
        if None in codes or not torch.equal(self.flats[:, 0], self.flats[:, 1]):
            return None
        starts = torch.tensor([flat.data_ptr() for flat in flats])[self.flats]
        sizes = torch.tensor([flat.element_size() for flat in flats])[self.flats]
        dtypes = torch.tensor(codes)[self.flats[:, 0]]
        return torch.cat([starts + sizes * self.offsets, torch.stack([self.ranks, dtypes], 1)], 1)


LAYOUTS: Memo[tuple[Mapping[str, Span], Mapping[str, TargetModule]], FlatLayout] = Memo()
