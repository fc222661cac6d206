from collections.abc import Callable

import pytest
from tests.tiny_models import tiny_base
from transformers import PreTrainedTokenizerFast

from loradeck import Base


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """Every test here computes on one thread."""


@pytest.fixture
def make(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Base]:
    """Return a function that makes a base of a shape, the same weights each time."""
    return lambda kind: tiny_base(kind, tiny_tokenizer)


@pytest.fixture
def base(make: Callable[[str], Base]) -> Base:
    return make("llama")
