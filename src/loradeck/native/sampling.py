"""The token that follows: the likeliest, or one that is drawn; and its log-probability.

In C (sampling.h) where the logits lie on a CPU. The definition in torch is for other devices, and for machines where
the C code is not usable.

N rows   V vocabulary
"""

import ctypes
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from loradeck.native.library import CChoice, any_library, latest

CANDIDATES = 1024  # the likeliest tokens that top_p looks at before it looks at all

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The logits of one token, and how it is chosen."""

    logits: Tensor
    """(V,) the model's own, in a floating-point dtype."""
    adjusted: Tensor | None = None
    """(V,) what the token is chosen from, if these are others."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    u: float = 0.0
    """A random number, at least 0 and below 1."""
    logprobs: int | None = None
    """How many of the likeliest tokens are scored besides the one that is chosen; None: neither."""

    @property
    def cut(self) -> bool:
        """Whether only some of the likeliest tokens are kept."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)


class Choice(NamedTuple):
    """What was chosen from a row."""

    token: int
    """Without a meaning where `largest` is not finite, or `best` is NaN or -Inf."""
    largest: float
    """Of the model's own logits: NaN if one is, infinite if one is or if all are -Inf."""
    best: float
    """The largest of those that the token was chosen from."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(id, log-probability) of the likeliest tokens, best first."""


def choose(rows: Sequence[Row]) -> list[Choice]:
    """Return the choice of each row; all are on one device, and may have vocabularies of different sizes.

    Raises:
        MemoryError: there is not enough.
    """
    c = _c(rows[0].logits) if rows else None
    sizes: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        sizes.setdefault(len(row.logits), []).append(i)
    choices: dict[int, Choice] = {}
    for places in sizes.values():
        some = [rows[i] for i in places]
        choices |= zip(places, choose_in_torch(some) if c is None else choose_in_c(c, some), strict=True)
    return [choices[i] for i in range(len(rows))]


def score(logits: Tensor, tokens: Sequence[int], count: int) -> list[Choice]:
    """Return tokens (N) with their log-probabilities in logits (N, V), and the `count` likeliest of each row.

    Raises:
        IndexError: there is no such token.
        MemoryError: there is not enough.
    """
    if not 0 <= min(tokens, default=0) <= max(tokens, default=0) < logits.shape[1]:
        raise IndexError(f"a token is out of bounds: there are {logits.shape[1]}")
    c = _c(logits)
    if c is not None:
        return choose_in_c(c, [Row(row, logprobs=count) for row in logits], tokens)
    largest = logits.amax(-1).tolist()
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    top = [_top(row, count) for row in logprobs]
    return [*map(Choice, tokens, largest, largest, chosen, top)]


# ---- in C


def choose_in_c(c: ctypes.CDLL, rows: Sequence[Row], tokens: Sequence[int] | None = None) -> list[Choice]:
    """Choose or, where tokens are given, score them. The logits are on the CPU.

    Raises:
        MemoryError: there is not enough.
    """
    vocabulary = len(rows[0].logits)
    choices = (CChoice * len(rows))()
    memory: list[object] = []
    for i, (choice, row) in enumerate(zip(choices, rows, strict=True)):
        logits = row.logits.float().contiguous()
        adjusted = logits if row.adjusted is None else row.adjusted.float().contiguous()
        memory += logits, adjusted
        choice.logits, choice.adjusted = logits.data_ptr(), adjusted.data_ptr()
        choice.temperature, choice.top_p, choice.min_p, choice.u = row.temperature, row.top_p, row.min_p, row.u
        choice.top_k = min(row.top_k, vocabulary)
        choice.token = -1 if tokens is None else tokens[i]
        choice.scored = row.logprobs is not None
        if row.logprobs:
            choice.tops = tops = min(row.logprobs, vocabulary)
            choice.top_ids, choice.top_logprobs = (ctypes.c_int64 * tops)(), (ctypes.c_float * tops)()
    if c.loradeck_sample(choices, len(rows), vocabulary, torch.get_num_threads()):
        raise MemoryError("out of memory in sampling; send fewer rows at once")
    return [_chosen(choice) for choice in choices]


def _chosen(choice: CChoice) -> Choice:
    tops = choice.tops
    top = tuple(zip(choice.top_ids[:tops], choice.top_logprobs[:tops], strict=True)) if tops else ()
    return Choice(choice.token, choice.largest, choice.best, choice.logprob if choice.scored else None, top)


def _c(logits: Tensor) -> ctypes.CDLL | None:
    """Return the C code, if it is to be used for these logits."""
    return _usable(latest()) if logits.device.type == "cpu" else None


@cache
def _usable(c: ctypes.CDLL | None) -> ctypes.CDLL | None:
    """Return this C code, compiled now if there is none yet; None if it does not choose what the definition does."""
    x = torch.randn(2, 333, generator=torch.Generator().manual_seed(0)) * 3
    row = Row(x[0], temperature=0.8, logprobs=3)
    rows = [row, replace(row, top_k=9), replace(row, top_p=0.9), replace(row, min_p=0.1), replace(row, adjusted=x[1])]
    rows = [replace(each, u=u) for each in rows for u in (0.2, 0.7)]
    try:
        c = c or any_library()
        for one, other in zip(choose_in_c(c, rows), choose_in_torch(rows), strict=True):
            if one.token != other.token:
                raise ValueError("another token on this machine")
            numbers, same = (torch.tensor([*each[1:4], *sum(each.top, ())]) for each in (one, other))
            torch.testing.assert_close(numbers, same, rtol=1e-5, atol=1e-5)
    except Exception as error:  # compilers that are missing, or refuse this machine, raise no common type
        log.info("tokens are chosen by torch, not in C: %s", str(error).partition("\n")[0])
        return None
    return c


# ---- the definition


def choose_in_torch(rows: Sequence[Row]) -> list[Choice]:
    """Choose; all rows that only ask for the likeliest token in one operation."""
    plain = [i for i, row in enumerate(rows) if not row.temperature and row.logprobs is None and row.adjusted is None]
    choices: dict[int, Choice] = {}
    if plain:
        values, tokens = torch.stack([rows[i].logits for i in plain]).max(-1)
        most = values.tolist()
        choices |= zip(plain, map(Choice, tokens.tolist(), most, most), strict=True)
    return [choices[i] if i in choices else _choose(row) for i, row in enumerate(rows)]


def _choose(row: Row) -> Choice:
    logits = row.logits.float()
    adjusted = logits if row.adjusted is None else row.adjusted.float()
    largest = float(logits.max())
    best, likeliest = (each.item() for each in adjusted.max(-1))
    draws = row.temperature and math.isfinite(largest) and math.isfinite(best)
    token = _draw(adjusted, row) if draws else int(likeliest)
    if row.logprobs is None:
        return Choice(token, largest, best)
    logprobs = logits.log_softmax(-1)
    return Choice(token, largest, best, float(logprobs[token]), _top(logprobs, row.logprobs))


def _top(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Return (id, logprob) of the `count` likeliest tokens of logprobs (V,), best first."""
    if not count:
        return ()
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _draw(logits: Tensor, row: Row) -> int:
    """Draw a token from logits (V,) by inverting the cumulative distribution at u."""
    logits = (logits - logits.max()) / row.temperature
    ids: Tensor | None = None
    if row.cut:
        total = logits.logsumexp(-1)
        best, ids = logits.topk(min(row.top_k or CANDIDATES, len(logits)))
        if not row.top_k and _reaches_beyond(best, total, row):
            best, ids = logits.sort(descending=True)
        if row.top_k:
            total = best.logsumexp(-1)
        logits = _kept(best, total, row)
    cdf = logits.double().softmax(-1).cumsum(-1)
    index = int(torch.searchsorted(cdf, row.u * float(cdf[-1]), right=True))
    index = min(index, len(logits) - 1)
    return int(ids[index]) if ids is not None else index


def _reaches_beyond(best: Tensor, total: Tensor, row: Row) -> bool:
    """Say whether top_p or min_p may keep more tokens than these candidates."""
    if row.top_p < 1:
        return float((best - total).exp().sum()) < row.top_p
    return float(best[-1]) >= math.log(row.min_p)


def _kept(best: Tensor, total: Tensor, row: Row) -> Tensor:
    """Return the logits, best first, with -inf for tokens that top_p or min_p rules out; the best one always stays."""
    out = torch.zeros(len(best), dtype=torch.bool, device=best.device)
    if row.top_p < 1:
        probabilities = (best - total).exp()
        out |= probabilities.cumsum(-1) - probabilities >= row.top_p
    if row.min_p:
        out |= best < math.log(row.min_p)
    out[0] = False
    return best.masked_fill(out, -math.inf)
