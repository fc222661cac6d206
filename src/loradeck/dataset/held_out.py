"""Hold some examples out, to validate on."""

import random
from array import array
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from loradeck.dataset.token_file import StoredExamples
from loradeck.errors import ConfigError, DataError

E = TypeVar("E", bound=StoredExamples[Any])


def held_out(examples: E, ratio: float, seed: int) -> tuple[E, E]:
    """Split examples into training and validation examples, about `ratio` of them; at least one each, in order.

    Equal examples stay together, so none is on both sides. The same examples and seed give the same split.

    Raises:
        ConfigError: the ratio is not between 0 and 1.
        DataError: no two examples differ.
    """
    if not 0 < ratio < 1:
        raise ConfigError(f"the ratio to hold out must be between 0 and 1, not {ratio!r:.40}")
    held = _chosen(*_groups(_hashes(examples)), ratio, seed)
    return examples.at(_indices(~held)), examples.at(_indices(held))


def _chosen(first: NDArray[np.uint32], sizes: NDArray[np.uint32], ratio: float, seed: int) -> NDArray[np.bool_]:
    """Say of each example whether it is held out, by groups of equal ones."""
    groups = _indices(sizes > 0)
    if len(groups) < 2:
        raise DataError("all examples are equal, so none can be held out", hint="Give more examples.")
    limit = min(max(1, round(ratio * len(first))), len(first) - 1)
    random.Random(f"held out {seed}").shuffle(groups)  # a string seeds alike in every process
    held = np.zeros(len(first), np.bool_)
    count = 0
    for group in groups:
        if count + sizes[group] <= limit:
            held[group] = True
            count += int(sizes[group])
        if count == limit:
            break
    if not count:
        held[min(groups, key=lambda group: sizes[group])] = True
    return held[first]


def _indices(mask: NDArray[np.bool_]) -> "array[int]":
    indices = array("I")
    indices.frombytes(np.arange(len(mask), dtype=np.uint32)[mask].view(np.uint8).data)
    return indices


def _hashes(examples: StoredExamples[Any]) -> NDArray[np.uint64]:
    hashes = np.empty(len(examples), np.uint64)
    start = 0
    for entries in examples.entries():
        hashes[start : start + len(entries)] = entries["hash"][:, 0]
        start += len(entries)
    return hashes


def _groups(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return for each hash the first that equals it; and how many equal it, or 0 if it is not the first of them."""
    first, sizes = np.zeros(len(hashes), np.uint32), np.zeros(len(hashes), np.uint32)
    buckets = hashes.view(np.uint8)[:: hashes.itemsize]  # sorted one after the other, which needs less memory
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        _, leaders, inverse, counts = np.unique(
            hashes[members], return_index=True, return_inverse=True, return_counts=True
        )
        first[members] = members[leaders][inverse]
        sizes[members[leaders]] = counts
    return first, sizes
