"""Rows that are continued together by the compiled step, token by token, until all have ended: for `generate`.

N rows   V vocabulary
"""

import logging
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loradeck.base.blocked import BlockLinear
from loradeck.base.quantised import QuantisedLinear
from loradeck.errors import ConfigError
from loradeck.lora.adapter import Adapter
from loradeck.native import step
from loradeck.native.adapter import NativeAdapter
from loradeck.native.library import multiplies_halves
from loradeck.native.model import NativeModel
from loradeck.native.pages import PAGE
from loradeck.native.step import Chunk, Uses
from loradeck.runner.activations import INT8, Activations
from loradeck.runner.description import describe
from loradeck.runner.page_pool import PagePool
from loradeck.runner.speculation import MAX_DRAFTS, MEMORY_BOUND, Acceptance, PromptLookup, draft_counts
from loradeck.runner.trial import LENGTHS, agrees, check_with, own_logits, prompts

log = logging.getLogger(__name__)
_models: WeakKeyDictionary[PreTrainedModel, tuple[tuple[object, ...], NativeModel | None]] = WeakKeyDictionary()


@dataclass(eq=False, slots=True)
class Row:
    """A text, and what is known of what follows it."""

    text: list[int]
    uses: Uses
    """Its adapters."""
    end: int
    """How many tokens the text has at most."""
    pages: "array[int]" = field(default_factory=lambda: array("Q"))
    read: int = 0
    """How many of its tokens have their keys and values in the pages."""
    drafts: deque[int] = field(default_factory=deque)
    """Those that are not checked yet."""
    logits: deque[Tensor] = field(default_factory=deque)
    """(V,) of what follows the text, and then of what follows each draft."""
    lookup: PromptLookup = field(default_factory=PromptLookup)
    acceptance: Acceptance = field(default_factory=Acceptance)
    drafted: int = 0
    accepted: int = 0
    """Drafts of the last step."""

    def append(self, token: int) -> None:
        """Add the token that was chosen. If it was the next draft, what follows is known."""
        self.text.append(token)
        if self.drafts and self.drafts.popleft() == token:
            self.read += 1
            self.accepted += 1
        else:
            self.drafts.clear()
            self.logits.clear()


class NativeBatch:
    """Some rows and what the step keeps of them."""

    def __init__(
        self, model: NativeModel, rows: Sequence[Sequence[int]], uses: Sequence[Uses], max_tokens: int = 1
    ) -> None:
        """`uses` are each row's adapters; `max_tokens` is the maximum number of tokens that follow a row."""
        self._model = model
        self._pool = PagePool(model.page_bytes, budget=1 << 62)  # as much as there is memory
        self._running = {
            i: Row([*row], each, len(row) + max_tokens) for i, (row, each) in enumerate(zip(rows, uses, strict=True))
        }

    def forward(self) -> tuple[list[int], Tensor | list[Tensor]]:
        """Return some rows, and the logits (V,) of what follows each; compute a step if they are known of no row."""
        if any(row.logits for row in self._running.values()):
            ready = [i for i, row in self._running.items() if row.logits]
            return ready, [self._running[i].logits.popleft() for i in ready]
        self._draft()
        rows = [*self._running.values()]
        for row in rows:
            missing = -(-(len(row.text) + len(row.drafts)) // PAGE) - len(row.pages)
            row.pages.extend(self._pool.take() for _ in range(missing))
        chunks = [
            Chunk([*row.text[row.read :], *row.drafts], row.read, row.pages.buffer_info()[0], row.uses, 1 + row.drafted)
            for row in rows
        ]
        logits = step.run(self._model, chunks, torch.get_num_threads())
        for row in rows:
            row.read = len(row.text)
        if len(rows) == len(logits):
            return [*self._running], logits
        for row, each in zip(rows, logits.split([chunk.wanted for chunk in chunks]), strict=True):
            row.logits.extend(each)
        return [*self._running], [row.logits.popleft() for row in rows]

    def append(self, tokens: Mapping[int, int | None]) -> None:
        """Add the next token of each row that `forward` returned; None to one that ends."""
        for i, token in tokens.items():
            if token is None:
                del self._running[i]
            else:
                self._running[i].append(token)

    def _draft(self) -> None:
        """Draft tokens where they are likely to pay."""
        rows = [*self._running.values()]
        for row in rows:
            row.acceptance.record(row.drafted, row.accepted)
            row.drafted = row.accepted = 0
        unread = sum(len(row.text) - row.read for row in rows)
        if unread >= MEMORY_BOUND:
            return
        proposals = [row.lookup.propose(row.text, min(MAX_DRAFTS, row.end - len(row.text) - 1)) for row in rows]
        counts = draft_counts([row.acceptance for row in rows], [*map(len, proposals)], unread)
        for row, drafts, count in zip(rows, proposals, counts, strict=True):
            row.drafts.extend(drafts[:count])
            row.drafted = count


def packed_adapter(model: NativeModel, adapter: Adapter) -> NativeAdapter:
    """Return an adapter as the step reads it.

    Raises:
        ValueError: it adapts what the step does not know.
    """
    if adapter.saved or adapter.added:
        raise ValueError("it replaces modules, or has tokens of its own")
    return NativeAdapter(model, {path: weights for path in adapter.sites if (weights := adapter.weights(path))})


def native_model(model: PreTrainedModel, activations: Activations = "auto") -> NativeModel | None:
    """Return a model as the step reads it, without a copy; None if its weights do not lie in blocks, or it cannot be.

    It is packed once, and again when a weight has changed: a merge does that.

    Raises:
        ConfigError: int8 activations are asked for, and it cannot be.
    """
    if not any(isinstance(module, BlockLinear | QuantisedLinear) for module in model.modules()):
        if activations == "int8":
            raise no_int8("its weights are not quantised")
        return None
    weights = tuple(part for parameter in model.parameters() for part in (id(parameter), parameter._version))
    known, native = _models.get(model, ((), None))
    if known != (activations, *weights):
        native = _try(model, activations)
        _models[model] = (activations, *weights), native
    return native


def no_int8(why: object) -> ConfigError:
    """Return the error that says why a model does not take int8 activations."""
    return ConfigError(
        f"the base takes no int8 activations: {why}",
        hint="They are for quantised weights in the compiled step.",
        python="Load the base with weights='int4' or 'int8', or leave activations='auto'.",
        cli="Add --weights int4 or int8, or leave --activations out.",
    )


def _try(model: PreTrainedModel, activations: Activations) -> NativeModel | None:
    try:
        native = NativeModel(describe(model), halves=multiplies_halves(model.dtype), int8=INT8[activations])
        texts = prompts(model)
        definition = own_logits(model, texts)

        def check() -> None:
            _, logits = NativeBatch(native, texts, [()] * len(LENGTHS)).forward()
            if not all(agrees(*each, int8=native.int8) for each in zip(logits, definition, strict=True)):
                raise ValueError("its logits differ from the model's own")

        check_with(native, activations, check)
    except Exception as error:  # what compilers and other people's models raise has no common class
        if activations == "int8":
            raise no_int8(error) from error
        log.warning("%s is computed by transformers' modules: %s", type(model).__name__, error)
        return None
    return native
