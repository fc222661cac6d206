"""Rows of an embedding or an output head beyond the base's, which an adapter has for tokens that it adds.

V rows of the base   K rows beyond them   H hidden size   N positions
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from loradeck.errors import AdapterError
from loradeck.lora.manifest import EMBEDDING, AdapterFiles, copied_module, resized_key
from loradeck.lora.saved_modules import computed
from loradeck.ops.layer_kinds import EmbeddingKind, LayerKind, dense_weight
from loradeck.ops.weights import LoraWeights


@dataclass(frozen=True, slots=True)
class AddedRows:
    """Which of an adapter's tensors have rows of a module beyond the base's."""

    base: int
    """V"""
    count: int
    """K"""
    weights: Mapping[str, str] = field(default_factory=dict)
    """The keys of the module's parameters by their names. Without any, a tied module has the other one's rows."""
    pair: str | None = None
    """The key of A or B that has a part for each row."""
    trained: bool = False
    """Whether the weights are of modules_to_save; else they are copies of a resized base's, which do not train."""

    @property
    def keys(self) -> list[str]:
        """All keys."""
        return [*self.weights.values(), *([self.pair] if self.pair else [])]

    def dimension(self, key: str) -> int:
        """Return the dimension of a tensor that its rows are along."""
        return int(key.endswith(EMBEDDING[0]))

    def base_weight(self, module: nn.Module | None, key: str) -> Tensor:
        """Return what stands before the rows of a weight: the base's.

        Raises:
            AdapterError: there is no base.
        """
        if module is None:
            raise AdapterError(
                f"of {key} the adapter has only the rows beyond its base's, and it is in no bank of that base",
                python="Load it with bank.load(folder), and save it with bank.save(name, folder).",
            )
        name = next(name for name, other in self.weights.items() if other == key)
        return dense_weight(module) if name == "weight" else module.get_parameter(name)


def of_files(files: AdapterFiles, tensors: Mapping[str, Tensor]) -> dict[str, AddedRows]:
    """Return what the rows beyond the base's in tensors, by their keys in files, are of: by the module's path."""
    added: dict[str, AddedRows] = {}
    for path, base in files.base_rows.items():
        saved = files.saved.get(path, {})
        weights = {key.rpartition(".")[2]: key for key in files.copies if copied_module(key) == path} | {**saved}
        weights = {name: key for name, key in weights.items() if key in tensors}
        pair = resized_key(path, files.sites[path]) if path in files.sites else None
        if weights or pair:
            key = pair or next(iter(weights.values()))
            count = tensors[key].shape[int(key.endswith(EMBEDDING[0]))]
            added[path] = AddedRows(base, count, weights, pair, trained=bool(saved))
    return added


class Extension:
    """What an adapter has in place of an embedding or a head: the base's, and more rows."""

    def __init__(self, module: nn.Module, kind: LayerKind, added: AddedRows, part: nn.Parameter | None) -> None:
        """`module` has the rows alone. `part` are those of A (r, K) of an embedding, or of B (K, r) of a head."""
        self.module, self.kind, self.base, self.count = module, kind, added.base, added.count
        self._part = part

    def rows(self, x: Tensor) -> Tensor:
        """Ids (N,) from V on -> (N, H), or hidden states (…, H) -> (…, K), without a pair."""
        return computed(self.module, x - self.base if isinstance(self.kind, EmbeddingKind) else x)

    def update(self, x: Tensor, pair: LoraWeights | None) -> Tensor | None:
        """Return what the pair adds to `rows(x)`, None if there is none."""
        if self._part is None or pair is None:
            return None
        dtype = torch.promote_types(self._part.dtype, torch.float32)
        part = self._part.to(dtype)
        if isinstance(self.kind, EmbeddingKind):
            h, b = self.kind.shrink(x - self.base, part), pair.b.to(dtype)
        else:
            h, b = self.kind.shrink(x.to(dtype), pair.a.to(dtype)), part
        return pair.scaling * (h @ b.T)

    def merged_update(self, pair: LoraWeights | None) -> Tensor | None:
        """Return what the pair adds to the rows' weight (K, H), None if there is none."""
        if self._part is None or pair is None:
            return None
        part = self._part.float()
        if isinstance(self.kind, EmbeddingKind):
            return pair.scaling * self.kind.delta(part, pair.b.float())
        return pair.scaling * self.kind.delta(pair.a.float(), part)


Part: TypeAlias = nn.Module | Extension | None
"""What an adapter has in place of an embedding or a head; None for the base's."""


def count_of(part: Part, rows: int) -> int:
    """Return K of what an adapter has in place of a module of V `rows`."""
    if part is None or isinstance(part, Extension):
        return part.count if part else 0
    return len(part.get_parameter("weight")) - rows


def shared_count(members: Iterable[tuple[int, float]]) -> int:
    """Return how many rows a blend has, of the K and the weights of its adapters: those that all of them have.

    If the weights add up to 0, the rows have no mean, so there are none.
    """
    counts, weights = [*zip(*members, strict=True)] or ((0,), (0.0,))
    return int(min(counts)) if sum(weights) else 0
