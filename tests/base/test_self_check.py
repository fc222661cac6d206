"""A kernel is used where it is there, right, and not merely emulated."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.base.self_check import self_check


def plain(weight: Tensor):
    return lambda x: F.linear(x, weight)


def test_the_plain_way_is_as_good_as_itself() -> None:
    assert self_check(lambda weight: (plain(weight), plain(weight)), torch.float32, 0.0) == ""


def test_a_wrong_kernel_is_found_out() -> None:
    problem = self_check(lambda weight: (plain(weight * 1.01), plain(weight)), torch.float32, 1e-3)
    assert problem == "is off by 1.0e-02 here"


def test_a_kernel_that_is_wrong_for_several_rows_is_found_out() -> None:
    def fast(weight: Tensor):
        return lambda x: F.linear(x, weight) * (1 if len(x) == 1 else float("nan"))

    assert "is off by nan" in self_check(lambda weight: (fast(weight), plain(weight)), torch.float32, 1e-3)


def test_an_emulated_kernel_is_found_out() -> None:
    def fast(weight: Tensor):
        def product(x: Tensor) -> Tensor:
            time.sleep(0.02)
            return F.linear(x, weight)

        return product

    assert "is slower here" in self_check(lambda weight: (fast(weight), plain(weight)), torch.float32, 0.0)


@pytest.mark.parametrize("error", [AttributeError("no such op\nMore"), NotImplementedError(), RuntimeError("refused")])
def test_what_torch_raises_is_one_line(error: Exception) -> None:
    def pair(weight: Tensor):
        raise error

    problem = self_check(pair, torch.float32, 0.0)
    assert problem == f"is not to be had here ({str(error).partition(chr(10))[0] or type(error).__name__})"
