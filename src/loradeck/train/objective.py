"""Training objectives: SFT and DPO.

B examples   U units: examples that are trained on together (SFT: one, DPO: the chosen and the rejected one)
"""

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from loradeck.dataset.example import Example

Unit = Sequence[Example]


class Objective(Protocol):
    """A loss per unit. A step's loss is their sum over their `count`, so a batch may be split between any units."""

    needs_reference: bool
    """Whether it needs the losses of the adapter as it was at the start, too."""

    def count(self, units: Sequence[Unit]) -> int:
        """Return the number that a mean over units divides by."""
        ...

    def losses(self, units: Sequence[Unit], losses: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return each unit's loss (U,) and its margin (U,), given the adapter's and the reference's losses (B,).

        Only DPO has a margin.
        """
        ...


class SFT:
    """Supervised fine-tuning: -log p of the answers, averaged over supervised tokens."""

    needs_reference = False

    def count(self, units: Sequence[Unit]) -> int:
        return sum(example.supervised for unit in units for example in unit)

    def losses(self, units: Sequence[Unit], losses: Tensor, reference: Tensor | None) -> tuple[Tensor, None]:
        assert reference is None
        assert len(losses) == len(units)
        return losses, None


class DPO:
    """Direct preference optimization (arXiv:2305.18290, equation 7), averaged over pairs.

    -log σ(margin) + w · -log p(chosen) / tokens of chosen
    margin = β · ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)))

    The second term is RPO's (arXiv:2404.19733): without it both answers may become less likely, the chosen one only by
    less. The reference is the adapter at the start of the run; for a new adapter, that is the base.
    """

    needs_reference = True

    def __init__(self, beta: float, sft_weight: float) -> None:
        self.beta, self.sft_weight = beta, sft_weight

    def count(self, units: Sequence[Unit]) -> int:
        return len(units)

    def losses(self, units: Sequence[Unit], losses: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        assert reference is not None
        rewards = self.beta * (reference - losses).view(-1, 2)  # log p is minus the loss
        margins = rewards[:, 0] - rewards[:, 1]
        tokens = losses.new_tensor([chosen.supervised for chosen, _ in units])
        return -F.logsigmoid(margins) + self.sft_weight * losses[::2] / tokens, margins
