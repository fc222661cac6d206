"""How an adapter is trained: the settings of a job, and those that the jobs of a run share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from cyclopts import Parameter

from loradeck.errors import ConfigError

Decay = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one job: how one adapter is trained.

    Raises:
        ConfigError: naming every invalid value.
    """

    learning_rate: Annotated[float | None, Parameter(alias="--lr")] = None
    """Peak learning rate of A and B; left out, it follows from the base's width (see train.schedule)."""
    epochs: int = 3
    """How often the dataset is trained on."""
    max_steps: int | None = None
    """Optimizer steps, instead of epochs; the dataset is cut short or repeated to fit."""
    batch_size: int = 8
    """Sequences per optimizer step; LoRA loses quality in large batches, so stay below 32."""
    max_length: int = 1024
    """Tokens per sequence; longer ones are cut at the end, and counted."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises to its peak."""
    schedule: Decay = "linear"
    """How the learning rate decays from its peak: linear or cosine, to zero; or constant."""
    weight_decay: float = 0.0
    """Decoupled weight decay of A and B."""
    max_grad_norm: float = 1.0
    """Gradients with a larger 2-norm are scaled down to it; inf turns clipping off."""
    seed: int = 0
    """Seed of the adapter's initial values, the order of the examples, dropout and the validation split."""
    loraplus_lr_ratio: float = 1.0
    """B's learning rate over A's (LoRA+, arXiv:2402.12354, which found 4 to 16 best)."""
    dpo_beta: float = 0.1
    """For preference pairs: how strongly the adapter is kept close to its start (DPO, arXiv:2305.18290)."""
    dpo_sft_weight: float = 1.0
    """For preference pairs: weight of the loss on the chosen answers, beside DPO's (RPO, arXiv:2404.19733); 0 for DPO
    alone."""
    valid_ratio: float = 0.0
    """Share of the dataset held out for validation, if it has no validation split of its own."""
    eval_every: int | None = None
    """Steps between evaluations on the validation examples; left out, ten in a run. The last step is evaluated too."""
    patience: int | None = None
    """End after this many evaluations in a row without a lower validation loss; left out, never."""

    def __post_init__(self) -> None:
        _check(
            self,
            {
                "learning_rate": (self.learning_rate is None or _is_positive(self.learning_rate), "a number above 0"),
                "epochs": (_is_integer(self.epochs), "an integer of at least 1"),
                "max_steps": (self.max_steps is None or _is_integer(self.max_steps), "an integer of at least 1"),
                "batch_size": (_is_integer(self.batch_size), "an integer of at least 1"),
                "max_length": (_is_integer(self.max_length, least=2), "an integer of at least 2"),
                "warmup_ratio": (_is_number(self.warmup_ratio) and self.warmup_ratio <= 1, "a number from 0 to 1"),
                "schedule": (self.schedule in get_args(Decay), "one of " + ", ".join(get_args(Decay))),
                "weight_decay": (_is_number(self.weight_decay), "a number of at least 0"),
                "max_grad_norm": (
                    self.max_grad_norm == math.inf or _is_positive(self.max_grad_norm),
                    "a number above 0",
                ),
                "seed": (_is_integer(self.seed, least=0), "an integer of at least 0"),
                "loraplus_lr_ratio": (_is_positive(self.loraplus_lr_ratio), "a number above 0"),
                "dpo_beta": (_is_positive(self.dpo_beta), "a number above 0"),
                "dpo_sft_weight": (_is_number(self.dpo_sft_weight), "a number of at least 0"),
                "valid_ratio": (_is_number(self.valid_ratio) and self.valid_ratio < 1, "a number from 0 to below 1"),
                "eval_every": (self.eval_every is None or _is_integer(self.eval_every), "an integer of at least 1"),
                "patience": (self.patience is None or _is_integer(self.patience), "an integer of at least 1"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """The settings that all jobs of a run share.

    Raises:
        ConfigError: naming every invalid value.
    """

    # More tokens make a CPU's matrix products no faster, and the activations saved for the backward pass are large.
    max_tokens: int = 1024
    """Tokens in one forward pass; a larger step is split, to the same gradient with less memory."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of storing their activations: slower, in less memory."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints to keep; older ones are removed."""
    samples: int = 2
    """Validation prompts that each adapter answers at each evaluation, and prompts at its end; 0 for none."""

    def __post_init__(self) -> None:
        _check(
            self,
            {
                "max_tokens": (_is_integer(self.max_tokens), "an integer of at least 1"),
                "gradient_checkpointing": (isinstance(self.gradient_checkpointing, bool), "true or false"),
                "checkpoint_every": (_is_integer(self.checkpoint_every), "an integer of at least 1"),
                "keep_checkpoints": (_is_integer(self.keep_checkpoints), "an integer of at least 1"),
                "samples": (_is_integer(self.samples, least=0), "an integer of at least 0"),
            },
        )


def _check(config: object, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raise a ConfigError with every field whose rule, (is it valid, what it must be), is broken."""
    problems = [
        f"{name} must be {what}, not {getattr(config, name)!r:.40}"
        for name, (valid, what) in rules.items()
        if not valid
    ]
    if problems:
        name = type(config).__name__
        raise ConfigError(f"invalid {name}", problems, python=f"See help({name}).", cli="See `loradeck train --help`.")


def _is_integer(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e9


def _is_positive(value: object) -> bool:
    return _is_number(value) and value != 0
