"""The losses against their formulas, by hand."""

import math

import pytest
import torch

from loradeck.dataset.example import Example, Preference
from loradeck.train.objective import DPO, SFT

ONE, OTHER = Example([1, 2, 3], [-100, 2, 3]), Example([1, 4], [-100, 4])


def test_sft_counts_supervised_tokens() -> None:
    objective = SFT()
    units = [objective.unit(ONE), objective.unit(OTHER)]
    assert objective.count(units) == 3
    losses, correct = objective.losses(torch.tensor([2.0, 5.0]), None)
    assert (losses.tolist(), correct) == ([2.0, 5.0], None)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_is_its_formula(beta: float) -> None:
    objective = DPO(beta)
    units = [objective.unit(Preference(ONE, OTHER)), objective.unit(Preference(OTHER, ONE))]
    assert units == [(ONE, OTHER), (OTHER, ONE)]
    assert objective.count(units) == 2
    chosen, rejected, base_chosen, base_rejected = -2.0, -5.0, -2.5, -4.0  # log-probabilities
    losses = torch.tensor([-chosen, -rejected, -rejected, -chosen])
    reference = torch.tensor([-base_chosen, -base_rejected, -base_rejected, -base_chosen])
    losses, correct = objective.losses(losses, reference)
    margin = (chosen - base_chosen) - (rejected - base_rejected)
    expected = [-math.log(1 / (1 + math.exp(-beta * each))) for each in (margin, -margin)]
    assert losses.tolist() == pytest.approx(expected)
    assert correct is not None
    assert correct.tolist() == [True, False]


def test_dpo_of_the_base_itself_is_log_two() -> None:
    same = torch.tensor([3.0, 4.0])
    losses, _ = DPO(0.1).losses(same, same)
    assert losses.tolist() == pytest.approx([math.log(2)])
