"""A kernel is used only if it exists, is correct, and is not merely emulated."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.base import self_check
from loradeck.base.self_check import Product, why_not_usable


def linear(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[Product, float]:
    """How long each product takes, by the clock of the check; 1 unless a test says otherwise."""
    times: dict[Product, float] = {}
    monkeypatch.setattr(self_check, "_seconds", lambda product, _: times.get(product, 1.0))
    return times


def test_the_plain_product_is_usable() -> None:
    assert why_not_usable(lambda weight: (linear(weight), linear(weight)), torch.float32, 0.0) is None


def test_a_wrong_kernel_is_not_usable() -> None:
    why = why_not_usable(lambda weight: (linear(weight * 1.01), linear(weight)), torch.float32, 1e-3)
    assert why == "wrong by 1.0e-02 on this machine"


def test_a_kernel_that_is_wrong_for_several_rows_is_not_usable() -> None:
    def kernel(weight: Tensor) -> Product:
        return lambda x: F.linear(x, weight) * (1 if len(x) == 1 else float("nan"))

    assert why_not_usable(lambda weight: (kernel(weight), linear(weight)), torch.float32, 1e-3).startswith(
        "wrong by nan"
    )


@pytest.mark.parametrize(("slowdown", "why"), [(2.0, None), (20.0, "20 times slower on this machine")])
def test_an_emulated_kernel_is_not_usable(seconds: dict[Product, float], slowdown: float, why: str | None) -> None:
    def products(weight: Tensor) -> tuple[Product, Product]:
        kernel, plain = linear(weight), linear(weight)
        seconds[kernel] = slowdown
        return kernel, plain

    assert why_not_usable(products, torch.float32, 0.0) == why


@pytest.mark.parametrize("error", [AttributeError("no such op\nMore"), NotImplementedError(), RuntimeError("refused")])
def test_an_error_of_torch_is_the_reason_in_one_line(error: Exception) -> None:
    def products(weight: Tensor) -> tuple[Product, Product]:
        raise error

    why = why_not_usable(products, torch.float32, 0.0)
    assert why == f"not available: {str(error).partition(chr(10))[0] or type(error).__name__}"


def test_a_product_is_timed() -> None:
    calls: list[Tensor] = []
    timed: Callable[..., float] = self_check.__dict__["_seconds"]
    assert timed(calls.append, torch.zeros(1)) >= 0
