"""The losses of classifiers, taggers and reward models, example by example.

B examples   T tokens of the longest one   L labels   N tokens with a label
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from loradeck.base.load import Base
from loradeck.dataset.example import UNSUPERVISED, Example, Preference
from loradeck.dataset.labelled_example import LabelledExample
from loradeck.errors import ConfigError
from loradeck.train.batching import PADDING
from loradeck.train.loss import Losses


class ClassifierLosses:
    """The losses of examples under a classifier, which reads rows padded on the right."""

    packed = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @contextmanager
    def of(self, examples: Sequence[Example]) -> Iterator[Tensor]:
        """Σ over an example's labels of -log p(label), and how many of them are the most likely ones: (B, 2), fp32.

        Raises:
            ConfigError: a label is beyond the head.
        """
        scores = self.scores(examples)
        targets = torch.tensor(
            [label for example in examples for label in example.labels if label != UNSUPERVISED], device=scores.device
        )
        if bool((targets >= scores.shape[-1]).any()):
            raise ConfigError(
                f"label {int(targets.max())} is beyond the head, which has {scores.shape[-1]} outputs",
                python="Add the adapter with bank.add(name, config, num_labels=len(dataset.labels)).",
            )
        losses = F.cross_entropy(scores, targets, reduction="none")
        correct = (scores.argmax(-1) == targets).to(losses.dtype)
        counts = torch.tensor([example.supervised for example in examples])
        example = torch.arange(len(examples)).repeat_interleave(counts).to(scores.device)
        yield losses.new_zeros(len(examples), 2).index_add(0, example, torch.stack([losses, correct], 1))

    def scores(self, examples: Sequence[Example]) -> Tensor:
        """Return the logits (N, L) where examples have a label, in their order; in fp32."""
        logits = _logits(self.model, examples)
        if logits.dim() == 3:
            logits = logits[
                _padded([example.labels for example in examples], UNSUPERVISED, logits.device) != UNSUPERVISED
            ]
        return logits.float()


class Rewards:
    """The rewards of examples under a reward model, which reads rows padded on the right."""

    packed = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @contextmanager
    def of(self, examples: Sequence[Example]) -> Iterator[Tensor]:
        """Yield the reward of each example (B,), in fp32."""
        yield _logits(self.model, examples)[:, 0].float()


def losses_of(base: Base) -> Losses | ClassifierLosses | Rewards:
    """Return what computes an example's loss, or its reward, on a base."""
    if base.task == "reward":
        return Rewards(base.model)
    return Losses(base.model) if base.task == "generate" else ClassifierLosses(base.model)


def check_kind(example: Example | Preference, task: str) -> None:
    """Check that an example is for the task that a base was loaded for.

    Raises:
        ConfigError: it is not, or the base was loaded for embeddings.
    """
    if task == "embed":
        raise ConfigError("a base that was loaded for embeddings has no loss", hint="Load it for another task.")
    fits = {
        "generate": not isinstance(example.sequences[0], LabelledExample),
        "reward": isinstance(example, Preference),
    }
    if not fits.get(task, isinstance(example, LabelledExample)):
        raise ConfigError(
            f"the base was loaded for the task {task}, and the examples are for another one",
            python=f"Read them with task={task!r}: see loradeck.dataset.read.read_dataset.",
        )


def _logits(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Return the logits of padded rows: (B, L), or (B, T, L) of a tagger."""
    device = model.device
    config = model.config.get_text_config()
    # A decoder's classifier finds each row's last token by this id, and RoBERTa its positions.
    padding = PADDING if config.pad_token_id is None else config.pad_token_id
    lengths = [len(example.tokens) for example in examples]
    inputs: dict[str, Any] = {
        "input_ids": _padded([example.tokens for example in examples], padding, device),
        "attention_mask": _padded([[1] * length for length in lengths], 0, device),
    }
    seconds = [example.second if isinstance(example, LabelledExample) else 0 for example in examples]
    if any(seconds) and getattr(config, "type_vocab_size", 0) > 1:
        types = [
            [int(bool(second) and at >= second) for at in range(length)]
            for second, length in zip(seconds, lengths, strict=True)
        ]
        inputs["token_type_ids"] = _padded(types, 0, device)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return model(**inputs).logits


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)
