"""Rows that are continued together by the compiled step, token by token, until all have ended: for `generate`.

N rows   V vocabulary
"""

import logging
from array import array
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loradeck.base.blocked import BlockLinear, multiplies_halves
from loradeck.lora.adapter import Adapter
from loradeck.native import step
from loradeck.native.adapter import NativeAdapter
from loradeck.native.model import NativeModel
from loradeck.native.pages import PAGE
from loradeck.native.step import Chunk, Uses
from loradeck.runner.description import describe
from loradeck.runner.page_pool import PagePool
from loradeck.runner.trial import LENGTHS, agrees, own_logits, prompts

log = logging.getLogger(__name__)
_models: WeakKeyDictionary[PreTrainedModel, tuple[tuple[object, ...], NativeModel | None]] = WeakKeyDictionary()


class NativeBatch:
    """Some rows and what the step keeps of them."""

    def __init__(self, model: NativeModel, rows: Sequence[Sequence[int]], uses: Sequence[Uses]) -> None:
        """`uses` are each row's adapters."""
        self._model, self._uses = model, uses
        self._pool = PagePool(model.page_bytes, budget=1 << 62)  # as much as there is memory
        self._pages = [array("Q") for _ in rows]
        self._unread: list[Sequence[int]] = [*rows]
        self._read = [0] * len(rows)
        self._logits = torch.empty(len(rows), model.table.vocabulary)

    def forward(self) -> Tensor:
        """Read the new tokens and return the logits (N, V) of what follows; of a row that has ended, the last ones."""
        rows = [row for row, tokens in enumerate(self._unread) if tokens]
        for row in rows:
            missing = -(-(self._read[row] + len(self._unread[row])) // PAGE) - len(self._pages[row])
            self._pages[row].extend(self._pool.take() for _ in range(missing))
        chunks = [
            Chunk(self._unread[row], self._read[row], self._pages[row].buffer_info()[0], self._uses[row], 1)
            for row in rows
        ]
        logits = step.run(self._model, chunks, torch.get_num_threads())
        for row in rows:
            self._read[row] += len(self._unread[row])
            self._unread[row] = ()
        if len(rows) == len(self._unread):
            self._logits = logits
        else:
            self._logits[rows] = logits
        return self._logits

    def append(self, tokens: Sequence[int | None]) -> None:
        """Add a token to each row; None to one that has ended."""
        self._unread = [() if token is None else (token,) for token in tokens]


def packed_adapter(model: NativeModel, adapter: Adapter) -> NativeAdapter:
    """Return an adapter as the step reads it.

    Raises:
        ValueError: it adapts what the step does not know.
    """
    return NativeAdapter(model, {path: weights for path in adapter.sites if (weights := adapter.weights(path))})


def native_model(model: PreTrainedModel) -> NativeModel | None:
    """Return a model as the step reads it, without a copy; None if its weights do not lie in blocks, or it cannot be.

    It is packed once, and again when a weight has changed: a merge does that.
    """
    if not any(isinstance(module, BlockLinear) for module in model.modules()):
        return None
    weights = tuple(part for parameter in model.parameters() for part in (id(parameter), parameter._version))
    known, native = _models.get(model, ((), None))
    if known != weights:
        native = _try(model)
        _models[model] = weights, native
    return native


def _try(model: PreTrainedModel) -> NativeModel | None:
    try:
        native = NativeModel(describe(model), halves=multiplies_halves(model.dtype))
        texts = prompts(model)
        batch = NativeBatch(native, texts, [()] * len(LENGTHS))
        if not all(map(agrees, batch.forward(), own_logits(model, texts))):
            raise ValueError("its logits differ from the model's own")
    except Exception as error:  # what compilers and other people's models raise has no common class
        log.info("%s is computed by transformers' modules: %s", type(model).__name__, error)
        return None
    return native
