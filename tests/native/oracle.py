"""The step's definition (`loradeck.native.reference`) with the roundings that a step makes by its dtypes."""

from dataclasses import replace

import pytest
import torch
from tests.native.tables import Blend
from torch import Tensor

from loradeck.native import reference
from loradeck.native.quantised import Quantised
from loradeck.native.table import Experts, Linear, Table


def logits(table: Table, tokens: list[int], blend: Blend, cache: torch.dtype, halves: bool) -> Tensor:
    """Return the logits (N, V) of the tokens before the first whose choice of experts is nearly a tie, which a rounding
    may turn. Keys and values are rounded to the cache's dtype; with `halves`, what matrices are multiplied with is
    rounded to bfloat16."""
    project, attend, choose = reference.project, reference.attend, reference.choose
    tie = 5e-2 if halves else 1e-3 if cache == torch.float32 else 2e-2
    clear = len(tokens)

    def halved(x: Tensor) -> Tensor:
        return x.bfloat16().float() if halves else x

    def rounded_project(linear: Linear, x: Tensor, updates: reference.Updates | None = None) -> Tensor:
        if isinstance(linear.stored, Quantised):
            linear = replace(linear, stored=halved(linear.weight))
        return project(linear, halved(x), updates)

    def rounded_attend(query: Tensor, key: Tensor, value: Tensor, scale: float, *more: float | None) -> Tensor:
        return attend(halved(query * scale), key.to(cache).float(), value.to(cache).float(), 1.0, *more)

    def rounded_softmax(scores: Tensor) -> Tensor:
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return halved(weights) / weights.sum(-1, keepdim=True)

    def clear_choose(experts: Experts, x: Tensor) -> reference.Choice:
        nonlocal clear
        ordered = rounded_project(experts.router, x).sort(1, descending=True).values
        if experts.chosen < ordered.shape[1]:
            lead = ordered[:, experts.chosen - 1] - ordered[:, experts.chosen]
            clear = min([clear, *(lead <= tie * ordered.abs().max()).nonzero()[:, 0].tolist()])
        return choose(experts, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "project", rounded_project)
        patch.setattr(reference, "attend", rounded_attend)
        patch.setattr(reference, "softmax", rounded_softmax)
        patch.setattr(reference, "choose", clear_choose)
        return reference.logits(table, torch.tensor(tokens), updates_of(blend))[:clear]


def updates_of(blend: Blend) -> reference.Updates:
    """Return a blend as one adapter, whose rank is the sum of theirs."""
    updates = {}
    for path in {path for pairs, _ in blend for path in pairs}:
        pairs = [(each[path], weight) for each, weight in blend if path in each]
        a = torch.cat([pair.a.float() for pair, _ in pairs])
        b = torch.cat([weight * pair.scaling * pair.b.float() for pair, weight in pairs], 1)
        updates[path] = a, b, 1.0
    return updates
