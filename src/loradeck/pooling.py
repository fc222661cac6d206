"""Texts to vectors or to probabilities of labels, each through its own adapter, as one batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

from loradeck.base.load import Base
from loradeck.base.task import check_task
from loradeck.base.text import check_ids
from loradeck.errors import ConfigError, RouteError
from loradeck.runner.pooling_runner import PoolingRow, PoolingRunner, check_finite

if TYPE_CHECKING:
    from loradeck.lora.bank import Bank
    from loradeck.lora.routing import RouteEntry


def embed(
    base: Base,
    bank: "Bank | None",
    texts: Sequence[str | Sequence[int]],
    adapters: "RouteEntry | Sequence[RouteEntry]" = None,
) -> Tensor:
    """Return a vector for each text, (texts, hidden size) float32, pooled as `base.pooling` says.

    A text is a string or token ids. `adapters` is one entry for all texts (a name, `{name: weight}`, or None for the
    base alone) or a list with one entry per text.

    Raises:
        ConfigError: the base was not loaded to embed; no text, an empty one, or one longer than the context.
        RouteError: adapters that do not fit the texts, or no bank that holds them.
        UnknownAdapterError: a name is not resident.
        LogitsError: a vector is NaN or Inf.
    """
    check_task(base.task, ("embed",))
    return torch.stack(_compute(base, bank, texts, adapters))


def classify(
    base: Base,
    bank: "Bank | None",
    texts: Sequence[str | Sequence[int]],
    adapters: "RouteEntry | Sequence[RouteEntry]" = None,
) -> list[Tensor]:
    """Return the probabilities of each text's labels (labels,); of a base for tokens, of each token's.

    How many labels there are is up to the text's adapter. Arguments and errors are those of `embed`, but for the task.
    """
    check_task(base.task, ("classify", "tokens"))
    return [probabilities(logits, base.model.config) for logits in _compute(base, bank, texts, adapters)]


def probabilities(logits: Tensor, config: PretrainedConfig) -> Tensor:
    """Return the probabilities of logits (…, labels): each label's own if there is one or several may hold at once.

    A regression's values stay as they are.
    """
    kind = getattr(config, "problem_type", None)
    if kind == "regression":
        return logits
    return logits.sigmoid() if kind == "multi_label_classification" or logits.shape[-1] == 1 else logits.softmax(-1)


def _compute(
    base: Base,
    bank: "Bank | None",
    texts: Sequence[str | Sequence[int]],
    adapters: "RouteEntry | Sequence[RouteEntry]",
) -> list[Tensor]:
    if isinstance(texts, str) or not texts:
        raise ConfigError("texts is not a list with at least one text", hint="Give a list: [text].")
    several = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    entries: list[RouteEntry] = [*adapters] if several else [adapters] * len(texts)  # type: ignore[list-item, misc]
    if len(entries) != len(texts):
        raise RouteError(
            f"the numbers of adapters and texts differ: {len(entries)} and {len(texts)}",
            hint="Give one entry per text, or one for all.",
        )
    if bank is None and any(entry is not None for entry in entries):
        raise RouteError("adapters are given, but no bank that holds them", python="Give the bank, or adapters=None.")
    rows = [PoolingRow(_tokens(base, text)) for text in texts]
    return [check_finite(result) for result in PoolingRunner(base, bank).run(rows, entries)]


def _tokens(base: Base, text: str | Sequence[int]) -> list[int]:
    tokens = [*base.tokenizer(text)["input_ids"]] if isinstance(text, str) else check_ids(base.tokenizer, text)
    if not tokens:
        raise ConfigError("a text is empty", hint="Give at least one token.")
    if base.context is not None and len(tokens) > base.context:
        raise ConfigError(f"a text of {len(tokens)} tokens; {base.name} takes {base.context}", hint="Shorten the text.")
    return tokens
