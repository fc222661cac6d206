"""How an adapter is trained. Knows numbers; knows no tensors, no files and no model."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from loradeck.errors import ConfigError

Shape = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The recipe of one job: how one adapter is trained.

    Raises:
        ConfigError: a value that cannot be; every one is named.
    """

    learning_rate: float | None = None
    """Peak learning rate of A and B; left out, it follows from the base's width (see train.schedule)."""
    epochs: int = 3
    """Passes over the dataset."""
    max_steps: int | None = None
    """Optimizer steps, in place of epochs: the dataset is cut short or repeated to fit."""
    batch_size: int = 8
    """Sequences per optimizer step; LoRA loses quality in large batches, so stay below 32."""
    max_length: int = 1024
    """Tokens per sequence; longer ones are cut at the end, and counted."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises to its peak."""
    schedule: Shape = "linear"
    """The learning rate's way from the peak down to zero, or none: linear, cosine or constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay of A and B."""
    max_grad_norm: float = 1.0
    """Gradients with a larger 2-norm are scaled down to it; inf leaves them as they are."""
    seed: int = 0
    """Seed of the adapter's first values, of the order of the examples, of dropout and of what is held out."""
    loraplus_lr_ratio: float = 1.0
    """B's learning rate over A's (LoRA+, arXiv:2402.12354, which found 4 to 16 best)."""
    dpo_beta: float = 0.1
    """For preference pairs: how dearly the adapter pays for leaving the base (DPO, arXiv:2305.18290)."""
    valid_ratio: float = 0.0
    """Share of the dataset held out for validation, where it has no validation split of its own."""
    eval_every: int | None = None
    """Steps between evaluations on the validation examples; left out, ten in a run. The last step is evaluated too."""
    patience: int | None = None
    """End after so many evaluations in a row without a lower validation loss; left out, never."""

    def __post_init__(self) -> None:
        wanted = {
            "learning_rate": (self.learning_rate is None or _positive(self.learning_rate), "a number above 0"),
            "epochs": (_whole(self.epochs), "a whole number from 1"),
            "max_steps": (self.max_steps is None or _whole(self.max_steps), "a whole number from 1"),
            "batch_size": (_whole(self.batch_size), "a whole number from 1"),
            "max_length": (_whole(self.max_length, least=2), "a whole number from 2"),
            "warmup_ratio": (_number(self.warmup_ratio) and self.warmup_ratio <= 1, "a number from 0 to 1"),
            "schedule": (self.schedule in get_args(Shape), "one of " + ", ".join(get_args(Shape))),
            "weight_decay": (_number(self.weight_decay), "a number from 0"),
            "max_grad_norm": (self.max_grad_norm == math.inf or _positive(self.max_grad_norm), "a number above 0"),
            "seed": (_whole(self.seed, least=0), "a whole number from 0"),
            "loraplus_lr_ratio": (_positive(self.loraplus_lr_ratio), "a number above 0"),
            "dpo_beta": (_positive(self.dpo_beta), "a number above 0"),
            "valid_ratio": (_number(self.valid_ratio) and self.valid_ratio < 1, "a number from 0 to below 1"),
            "eval_every": (self.eval_every is None or _whole(self.eval_every), "a whole number from 1"),
            "patience": (self.patience is None or _whole(self.patience), "a whole number from 1"),
        }
        problems = [f"{k} is {getattr(self, k)!r:.40}, not {what}" for k, (holds, what) in wanted.items() if not holds]
        if problems:
            raise ConfigError("This TrainConfig cannot be", problems, hint="See `help(TrainConfig)` for each field.")


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """What the jobs of one pass over the base share.

    Raises:
        ConfigError: a value that cannot be; every one is named.
    """

    # A CPU's matrix products gain nothing beyond, and what is kept for the backward pass is large.
    max_tokens: int = 1024
    """Tokens read at once; a larger step is computed in parts, to the same gradient with less memory."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what they left: slower, in less memory."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are removed."""
    samples: int = 2
    """Validation prompts that each adapter answers at each evaluation; 0 for none."""

    def __post_init__(self) -> None:
        least = {"max_tokens": 1, "checkpoint_every": 1, "keep_checkpoints": 1, "samples": 0}
        problems = [
            f"{name} is {getattr(self, name)!r:.40}, not a whole number from {low}"
            for name, low in least.items()
            if type(getattr(self, name)) is not int or getattr(self, name) < low
        ]
        if type(self.gradient_checkpointing) is not bool:
            problems.append(f"gradient_checkpointing is {self.gradient_checkpointing!r:.40}, not true or false")
        if problems:
            raise ConfigError("This PassConfig cannot be", problems, hint="See `help(PassConfig)` for each field.")


def _whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e9


def _positive(value: object) -> bool:
    return _number(value) and value != 0
