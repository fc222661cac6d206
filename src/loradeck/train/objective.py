"""What is made small: the loss of an answer, or of preferring one answer to another. Knows losses; knows no model.

B documents   U units: what is learned from as one, a document or a pair of them
"""

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from loradeck.dataset.example import Example, Preference

Unit = Sequence[Example]


class Objective(Protocol):
    """The loss of units, as a sum to be divided by their weight: so batches may be cut anywhere between units."""

    compares: bool
    """Whether the losses of the base alone are needed too."""

    def unit(self, example: Example | Preference) -> Unit:
        """Return the documents that are read for an example."""
        ...

    def weight(self, units: Sequence[Unit]) -> int:
        """Return what a mean divides by."""
        ...

    def losses(self, documents: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the loss of each unit (U,), and whether it is right, from the adapter's losses (B,) and the base's."""
        ...


class SFT:
    """Supervised fine-tuning: -log p of the answers, per supervised token."""

    compares = False

    def unit(self, example: Example | Preference) -> Unit:
        assert isinstance(example, Example)
        return (example,)

    def weight(self, units: Sequence[Unit]) -> int:
        return sum(document.supervised for unit in units for document in unit)

    def losses(self, documents: Tensor, reference: Tensor | None) -> tuple[Tensor, None]:
        assert reference is None
        return documents, None


class DPO:
    """Direct preference optimization (arXiv:2305.18290, equation 7), per pair; the reference is the base itself.

    -log σ(β · ((log p(chosen) - log p_base(chosen)) - (log p(rejected) - log p_base(rejected))))
    """

    compares = True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def unit(self, example: Example | Preference) -> Unit:
        assert isinstance(example, Preference)
        return (example.chosen, example.rejected)

    def weight(self, units: Sequence[Unit]) -> int:
        return len(units)

    def losses(self, documents: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        assert reference is not None
        rewards = (reference - documents).view(-1, 2)  # log p is minus the loss
        margin = rewards[:, 0] - rewards[:, 1]
        return -F.logsigmoid(self.beta * margin), margin > 0
