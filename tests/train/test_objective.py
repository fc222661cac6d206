"""The losses against their formulas, by hand."""

import math

import pytest
import torch

from loradeck.dataset.example import Example, Preference
from loradeck.dataset.labelled_example import LabelledExample
from loradeck.train.objective import DPO, SFT, Labels, Reward

ONE, OTHER = Example([1, 2, 3], [-100, 2, 3]), Example([1, 4], [-100, 4])


def test_sft_counts_supervised_tokens() -> None:
    objective = SFT()
    units = [ONE.sequences, OTHER.sequences]
    assert objective.count(units) == 3
    losses, margins, correct = objective.outcome(units, torch.tensor([2.0, 5.0]), None)
    assert (losses.tolist(), margins, correct) == ([2.0, 5.0], None, None)


@pytest.mark.parametrize(("beta", "dpo_sft_weight"), [(0.1, 0.0), (2.0, 0.0), (0.1, 1.5)])
def test_dpo_is_its_formula(beta: float, dpo_sft_weight: float) -> None:
    objective = DPO(beta, dpo_sft_weight)
    units = [Preference(ONE, OTHER).sequences, Preference(OTHER, ONE).sequences]
    assert units == [(ONE, OTHER), (OTHER, ONE)]
    assert objective.count(units) == 2
    one, other, start_one, start_other = -2.0, -5.0, -2.5, -4.0  # log-probabilities
    losses = torch.tensor([-one, -other, -other, -one])
    reference = torch.tensor([-start_one, -start_other, -start_other, -start_one])
    losses, margins, correct = objective.outcome(units, losses, reference)
    margin = beta * ((one - start_one) - (other - start_other))
    chosen = [-one / 2, -other / 1]  # per token: ONE has two that are trained on, OTHER one
    assert losses.tolist() == pytest.approx(
        [
            math.log(1 + math.exp(-each)) + dpo_sft_weight * nll
            for each, nll in zip((margin, -margin), chosen, strict=True)
        ]
    )
    assert margins is not None
    assert correct is not None
    assert margins.tolist() == pytest.approx([margin, -margin])
    assert correct.tolist() == [True, False]


def test_the_loss_of_labels_is_their_mean() -> None:
    objective = Labels()
    units = [(LabelledExample([1, 2], [0, 3]),), (LabelledExample([1, 2, 3], [-100, -100, 1]),)]
    assert objective.count(units) == 3
    losses, margins, correct = objective.outcome(units, torch.tensor([[2.0, 1.0], [5.0, 0.0]]), None)
    assert correct is not None
    assert (losses.tolist(), margins, correct.tolist()) == ([2.0, 5.0], None, [1.0, 0.0])


def test_reward_is_its_formula() -> None:
    units = [(ONE, OTHER), (OTHER, ONE)]
    losses, margins, correct = Reward().outcome(units, torch.tensor([3.0, 1.0, 0.0, 0.5]), None)
    assert margins is not None
    assert correct is not None
    assert (margins.tolist(), correct.tolist()) == ([2.0, -0.5], [True, False])
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-2)), math.log(1 + math.exp(0.5))])


def test_dpo_at_its_start_is_log_two() -> None:
    same = torch.tensor([3.0, 4.0])
    losses, *_ = DPO(0.1, 0.0).outcome([(ONE, OTHER)], same, same)
    assert losses.tolist() == pytest.approx([math.log(2)])
