"""Training objectives: SFT and DPO; and for other models than language models, labels and rewards.

B examples   U units: examples that are trained on together (one; of a preference pair, the chosen and the rejected one)
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from loradeck.dataset.example import Example
from loradeck.train.config import TrainConfig

Unit = Sequence[Example]


class Outcome(NamedTuple):
    """What an objective gives for some units."""

    losses: Tensor
    """(U,)"""
    margins: Tensor | None = None
    """(U,), of preference pairs."""
    correct: Tensor | None = None
    """(U,): how many of a unit's labels, or whether its pair, came out right."""


class Objective(Protocol):
    """A loss per unit. A step's loss is their sum over their `count`, so a batch may be split between any units."""

    name: str
    needs_reference: bool
    """Whether it needs the losses of the adapter as it was at the start, too."""

    def count(self, units: Sequence[Unit]) -> int:
        """Return the number that a mean over units divides by."""
        ...

    def outcome(self, units: Sequence[Unit], values: Tensor, reference: Tensor | None) -> Outcome:
        """Return the losses of units, given what the adapter's and the reference's `Losses` are (B, …)."""
        ...


class SFT:
    """Supervised fine-tuning: -log p of the answers, averaged over supervised tokens."""

    name = "sft"
    needs_reference = False

    def count(self, units: Sequence[Unit]) -> int:
        return sum(example.supervised for unit in units for example in unit)

    def outcome(self, units: Sequence[Unit], values: Tensor, reference: Tensor | None) -> Outcome:
        assert reference is None
        assert len(values) == len(units)
        return Outcome(values)


class Labels(SFT):
    """Classification: -log p of the labels, averaged over them."""

    name = "classification"

    def outcome(self, units: Sequence[Unit], values: Tensor, reference: Tensor | None) -> Outcome:
        assert reference is None
        assert len(values) == len(units)
        losses, correct = values.unbind(1)
        return Outcome(losses, correct=correct.detach())


class Reward:
    """Bradley and Terry's model of preferences: -log σ(r(chosen) - r(rejected)), averaged over pairs."""

    name = "reward"
    needs_reference = False

    def count(self, units: Sequence[Unit]) -> int:
        return len(units)

    def outcome(self, units: Sequence[Unit], values: Tensor, reference: Tensor | None) -> Outcome:
        assert reference is None
        assert len(values) == 2 * len(units)
        rewards = values.view(-1, 2)
        margins = rewards[:, 0] - rewards[:, 1]
        return Outcome(-F.logsigmoid(margins), margins, margins > 0)


class DPO:
    """Direct preference optimization (arXiv:2305.18290, equation 7), averaged over pairs.

    -log σ(margin) + w · -log p(chosen) / tokens of chosen
    margin = β · ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)))

    The second term is RPO's (arXiv:2404.19733): without it both answers may become less likely, the chosen one only by
    less. The reference is the adapter at the start of the run; for a new adapter, that is the base.
    """

    name = "dpo"
    needs_reference = True

    def __init__(self, beta: float, sft_weight: float) -> None:
        self.beta, self.sft_weight = beta, sft_weight

    def count(self, units: Sequence[Unit]) -> int:
        return len(units)

    def outcome(self, units: Sequence[Unit], values: Tensor, reference: Tensor | None) -> Outcome:
        assert reference is not None
        rewards = self.beta * (reference - values).view(-1, 2)  # log p is minus the loss
        margins = rewards[:, 0] - rewards[:, 1]
        tokens = values.new_tensor([chosen.supervised for chosen, _ in units])
        return Outcome(-F.logsigmoid(margins) + self.sft_weight * values[::2] / tokens, margins, margins > 0)


def objective_of(task: str, config: TrainConfig, *, preferences: bool) -> Objective:
    """Return the objective of a job on a base for this task."""
    if task == "reward":
        return Reward()
    if task != "generate":
        return Labels()
    return DPO(config.dpo_beta, config.dpo_sft_weight) if preferences else SFT()
