"""Whole rows through a model that does not generate, each through its own adapters: vectors, or logits of labels.

H the width of a vector   L labels of a row   T tokens of a row
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loradeck.base.load import Base
from loradeck.errors import LogitsError
from loradeck.lora.bank import Bank
from loradeck.lora.routing import RouteEntry, weights_of
from loradeck.lora.saved_modules import NO_LABEL

PROBE = (2, 3)  # rows and tokens of a batch whose numbers of rows are recorded; none divides the other
_shared: "WeakKeyDictionary[PreTrainedModel, frozenset[str]]" = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class PoolingRow:
    """The tokens of one row."""

    tokens: Sequence[int]
    types: Sequence[int] = ()
    """The type of each token, 0 or 1 in the second text of a pair; none for a single text."""


class PoolingRunner:
    """Computes batches of rows on a base that was loaded to classify, to reward or to embed."""

    def __init__(self, base: Base, bank: Bank | None) -> None:
        """The bank, if there are adapters, is the base's."""
        self.base, self.bank = base, bank
        self._model = base.model if bank is None else cast("PreTrainedModel", bank.model)
        config = base.model.config.get_text_config()
        self._accepted = signature(type(base.model).forward).parameters
        self._pad: int = config.pad_token_id or 0  # classifiers find a row's last token by it
        self._has_types = getattr(config, "type_vocab_size", 0) > 1

    def run(self, rows: Sequence[PoolingRow], entries: Sequence[RouteEntry]) -> list[Tensor]:
        """Return each row's vector (H,), logits (L,) or, of a base for tokens, logits of every token (T, L); float32.

        All rows are one batch, but those of adapters on a module that computes once for all rows, as DeBERTa's
        relative positions: they are batched adapter by adapter. A result may be NaN; the other rows' are not.

        Raises:
            UnknownAdapterError: a name is not resident.
            RouteError: a blend of heads with different numbers of labels.
        """
        keys = [weights_of(entry) for entry in entries]
        several = len({*keys}) > 1
        groups: dict[object, list[int]] = {}
        for index, key in enumerate(keys):
            groups.setdefault(key if several and self._is_shared(key) else None, []).append(index)
        results: dict[int, Tensor] = {}
        for group in groups.values():
            route = [entries[index] for index in group]
            same = len({keys[index] for index in group}) == 1
            outputs = self._compute([rows[index] for index in group], route[0] if same else route)
            results |= zip(group, outputs, strict=True)
        return [results[index] for index in range(len(rows))]

    def _is_shared(self, key: Sequence[tuple[str, float]]) -> bool:
        """Return whether one of these adapters adapts a module that computes once for all rows."""
        if self.bank is None or not key:
            return False
        with self.bank.route(None):
            modules = _modules_of_all_rows(self._model)
        return any(not modules.isdisjoint(self.bank[name].sites) for name, _ in key)

    @torch.no_grad()
    def _compute(self, rows: Sequence[PoolingRow], route: RouteEntry | Sequence[RouteEntry]) -> list[Tensor]:
        inputs = self._inputs(rows)
        with nullcontext() if self.bank is None else self.bank.route(route):
            output = self._model(**inputs)
        if self.base.pooling is not None:
            return [*self.base.pooling(output.last_hidden_state, inputs["attention_mask"]).cpu()]
        logits = [*output.logits.float().cpu()]
        if self.base.task == "tokens":
            logits = [each[: len(row.tokens)] for row, each in zip(rows, logits, strict=True)]
        return [_labels(each) for each in logits]

    def _inputs(self, rows: Sequence[PoolingRow]) -> dict[str, Any]:
        """Return the model's arguments, padded on the right."""
        longest = max(len(row.tokens) for row in rows)
        device = self._model.device

        def padded(values: Iterable[Sequence[int]], pad: int) -> Tensor:
            return torch.tensor([[*each, *[pad] * (longest - len(each))] for each in values], device=device)

        inputs: dict[str, Any] = {
            "input_ids": padded((row.tokens for row in rows), self._pad),
            "attention_mask": padded(([1] * len(row.tokens) for row in rows), 0),
        }
        if self._has_types and any(row.types for row in rows):
            inputs["token_type_ids"] = padded((row.types for row in rows), 0)
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        return {name: value for name, value in inputs.items() if name in self._accepted}


def check_finite(result: Tensor) -> Tensor:
    """Return a row's result.

    Raises:
        LogitsError: it is NaN or Inf.
    """
    if not result.isfinite().all():
        raise LogitsError("the result is NaN or Inf", hint="Train the adapter again with a lower learning rate.")
    return result


def _labels(logits: Tensor) -> Tensor:
    """Return logits (…, L) without those of labels that only other rows have."""
    present = (logits != NO_LABEL).reshape(-1, logits.shape[-1]).any(0)
    return logits[..., : int(present.nonzero().max()) + 1 if present.any() else 1]


def _modules_of_all_rows(model: PreTrainedModel) -> frozenset[str]:
    """Return the paths of the modules that get other rows than the batch has, found by computing a small one."""
    if model not in _shared:
        paths: set[str] = set()

        def hook(path: str) -> Any:
            def record(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                x = next(iter([*arguments, *named.values()]), None)
                if isinstance(x, Tensor) and (not x.dim() or x.shape[0] % PROBE[0]):
                    paths.add(path)

            return record

        handles = [
            module.register_forward_pre_hook(hook(path), with_kwargs=True)
            for path, module in model.named_modules()
            if not [*module.children()]
        ]
        try:
            with torch.no_grad():
                model(input_ids=torch.ones(PROBE, dtype=torch.long, device=model.device))
        finally:
            for handle in handles:
                handle.remove()
        _shared[model] = frozenset(paths)
    return _shared[model]
