"""Training objectives: SFT and DPO.

B examples   U units: examples that are trained on together (SFT: one, DPO: the chosen and the rejected one)
"""

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from loradeck.dataset.example import Example, Preference

Unit = Sequence[Example]


class Objective(Protocol):
    """A loss per unit. A step's loss is their sum over their `count`, so a batch may be split between any units."""

    needs_reference: bool
    """Whether it needs the losses of the base alone, too."""

    def unit(self, example: Example | Preference) -> Unit:
        """Return the sequences that an example consists of."""
        ...

    def count(self, units: Sequence[Unit]) -> int:
        """Return the number that a mean over units divides by."""
        ...

    def losses(self, losses: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return each unit's loss (U,) and whether it is correct (U,), given the adapter's and the base's losses (B,).

        Only DPO has a notion of correct.
        """
        ...


class SFT:
    """Supervised fine-tuning: -log p of the answers, averaged over supervised tokens."""

    needs_reference = False

    def unit(self, example: Example | Preference) -> Unit:
        assert isinstance(example, Example)
        return (example,)

    def count(self, units: Sequence[Unit]) -> int:
        return sum(example.supervised for unit in units for example in unit)

    def losses(self, losses: Tensor, reference: Tensor | None) -> tuple[Tensor, None]:
        assert reference is None
        return losses, None


class DPO:
    """Direct preference optimization (arXiv:2305.18290, equation 7), averaged over pairs; the base is the reference.

    -log σ(β · ((log p(chosen) - log p_base(chosen)) - (log p(rejected) - log p_base(rejected))))
    """

    needs_reference = True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def unit(self, example: Example | Preference) -> Unit:
        assert isinstance(example, Preference)
        return (example.chosen, example.rejected)

    def count(self, units: Sequence[Unit]) -> int:
        return len(units)

    def losses(self, losses: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        assert reference is not None
        rewards = (reference - losses).view(-1, 2)  # log p is minus the loss
        margin = rewards[:, 0] - rewards[:, 1]
        return -F.logsigmoid(self.beta * margin), margin > 0
