"""One step of a model in C: rows of tokens in, logits out."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loradeck.native.adapter import NativeAdapter
from loradeck.native.library import CBatch, CRoute, CUse
from loradeck.native.model import NativeModel
from loradeck.native.slots import SLOTS

NO_MEMORY = "out of memory in a step; send fewer rows or tokens at once"
Uses = tuple[tuple[NativeAdapter, float], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that follow each other, from `position` on."""

    tokens: Sequence[int]
    position: int
    pages: int
    """The address of the sequence's table of pages, which has room for these tokens."""
    uses: Uses
    """Its adapters, each at a weight."""
    wanted: int
    """How many of its tokens, counted from the end, need logits."""


def run(model: NativeModel, chunks: Sequence[Chunk], threads: int) -> Tensor:
    """Compute a step: write the chunks' keys and values to their pages; return the logits (S, V) of wanted tokens.

    Raises:
        IndexError: the model has no such token.
        MemoryError: nothing was written.
    """
    model.reach(max(chunk.position + len(chunk.tokens) for chunk in chunks))
    rows: list[tuple[int, int, int, int]] = []  # token, position, sequence, route
    want: list[int] = []
    routes: dict[Uses, int] = {}
    for sequence, chunk in enumerate(chunks):
        route = routes.setdefault(chunk.uses, len(routes))
        rows += [(token, chunk.position + i, sequence, route) for i, token in enumerate(chunk.tokens)]
        want += range(len(rows) - chunk.wanted, len(rows))
    columns = torch.tensor(rows).T.contiguous()
    low, high = torch.aminmax(columns[0])
    if low < 0 or high >= model.table.vocabulary:
        raise IndexError(f"the model has no token {int(low if low < 0 else high)}, only {model.table.vocabulary}")
    wanted = torch.tensor(want, dtype=torch.long)
    pages = torch.tensor([chunk.pages for chunk in chunks])
    c_routes = (CRoute * len(routes))()
    memory: list[object] = []
    ranks = 1
    for uses, number in routes.items():
        c_uses = (CUse * len(uses))(*(CUse(adapter.pairings, weight) for adapter, weight in uses))
        c_routes[number] = CRoute(c_uses, len(uses))
        memory.append(c_uses)
        for sites in zip(*(adapter.ranks for adapter, _ in uses), strict=True):
            ranks = max(ranks, sum(sites))
    try:
        logits = torch.empty(len(want), model.vocabulary)
    except RuntimeError as error:  # torch has none of its own for memory
        raise MemoryError(NO_MEMORY) from error
    batch = CBatch(
        rows=len(rows),
        wanted=len(want),
        **{name: columns[i].data_ptr() for i, name in enumerate(("tokens", "positions", "sequences", "routes"))},
        want=wanted.data_ptr(),
        pages=pages.data_ptr(),
        route=c_routes,
        ranks=ranks,
        logits=logits.data_ptr(),
    )
    if model.library.loradeck_step(ctypes.byref(model.c), ctypes.byref(batch), threads):
        raise MemoryError(NO_MEMORY)
    return logits[:, : model.table.vocabulary]


assert len(SLOTS) == 7  # as in adapters.h
