"""Masks are a function of seed and place, keep the share they should, and take nothing from anyone's chance."""

import os
import subprocess
import sys
from hashlib import sha256

import pytest
import torch

from loradeck.ops.dropout import Dropout, dropped

CPU = torch.device("cpu")
SHAPE = (400, 501)  # an odd number of elements

ELSEWHERE = """
import torch
from hashlib import sha256
from loradeck.ops.dropout import Dropout
torch.rand(7)
mask = Dropout(0.3, seed=-5).keep((400, 501), "layers.0.q_proj", torch.device("cpu"))
print(sha256(mask.numpy().tobytes()).hexdigest())
"""


class TestSeeded:
    """With a seed set."""

    def keep(self, seed: int = 1, place: str = "layers.0.q_proj", p: float = 0.3) -> torch.Tensor:
        return Dropout(p, seed=seed).keep(SHAPE, place, CPU)

    def test_one_seed_and_place_have_one_mask(self):
        first = self.keep()
        torch.rand(3)  # whatever else draws meanwhile
        self.keep(place="another")
        assert first.dtype == torch.bool
        assert first.shape == SHAPE
        assert torch.equal(self.keep(), first)

    def test_a_generator_beside_the_seed_is_left_alone(self):
        generator = torch.Generator().manual_seed(3)
        before = generator.get_state()
        assert torch.equal(Dropout(0.3, generator, seed=1).keep(SHAPE, "layers.0.q_proj", CPU), self.keep())
        assert torch.equal(generator.get_state(), before)

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        self.keep()
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.slow
    def test_another_process_has_the_same_mask(self):
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"}
        )
        assert done.stdout.strip() == sha256(self.keep(seed=-5).numpy().tobytes()).hexdigest(), done.stderr

    @pytest.mark.parametrize(
        "other",
        [{"seed": 2}, {"seed": 2**80}, {"seed": -1}, {"place": "layers.1.q_proj"}, {"place": "layers.0.k_proj"}],
        ids=str,
    )
    def test_another_seed_or_place_has_an_independent_mask(self, other):
        agree = (self.keep() == self.keep(**other)).double().mean().item()
        wanted, n = 0.7**2 + 0.3**2, SHAPE[0] * SHAPE[1]
        assert abs(agree - wanted) < 5 * (wanted * (1 - wanted) / n) ** 0.5


class TestUnseeded:
    """Without a seed: one mask after another."""

    def test_masks_follow_one_another_as_the_generator_draws(self):
        one, again = (Dropout(0.5, torch.Generator().manual_seed(4)) for _ in range(2))
        first, second = (one.keep((50,), "a", CPU) for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(again.keep((50,), "a", CPU), first)
        assert torch.equal(again.keep((50,), "a", CPU), second)

    def test_without_a_generator_torchs_own_draws(self):
        masks = []
        with torch.random.fork_rng(devices=[]):
            for seed in (0, 0, 1):
                torch.manual_seed(seed)
                masks.append(Dropout(0.5).keep((50,), "a", CPU))
        assert torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept(p):
    """Of all elements, of those in either half of a word, and of those kept after one that was kept."""
    keep = Dropout(p, seed=0).keep((1000, 1000), "a", CPU).flatten()
    for own in (keep, keep[::2], keep[1::2], keep[1:][keep[:-1]]):
        assert abs(own.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / len(own)) ** 0.5 + 2**-16


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1000), (1e-9, 1000), (1 - 1e-9, 0)])
def test_the_ends_of_the_scale(p, kept):
    assert abs(int(Dropout(p, seed=0).keep((1000,), "a", CPU).sum()) - kept) <= 1


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 1, 5)])
def test_any_shape(shape):
    assert Dropout(0.5, seed=0).keep(shape, "a", CPU).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropped_is_zero_where_nothing_is_kept(dtype):
    x, keep = torch.randn(40, 5).to(dtype), Dropout(0.4, seed=0).keep((40, 5), "a", CPU)
    got = dropped(x, keep)
    assert got.dtype == dtype
    assert torch.equal(got[keep], x[keep])
    assert not bool(got[~keep].any())
    assert dropped(x, None) is x


def test_the_mean_stays():
    assert Dropout(0.2).scale == pytest.approx(1 / (1 - 0.2))
