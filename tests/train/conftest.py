from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loradeck.base.load import Base
from loradeck.dataset.example import UNSUPERVISED, Example, Preference
from loradeck.dataset.record import Completion
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig

PROMPT = 3  # tokens of a random example that are context only


@pytest.fixture
def bank(base: Base) -> Bank:
    """A bank with one fresh adapter, named "one"."""
    bank = Bank(base.model)
    bank.add("one", LoraConfig(r=8), generator=torch.Generator().manual_seed(0))
    return bank


@pytest.fixture(scope="session")
def examples(tiny_tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    pairs = {"Hi": "Ahoy!", "Bye": "Fair winds", "2+2?": "4", "Sea?": "Aye, the sea"}
    return [Example.of(Completion(*pair), tiny_tokenizer, 256) for pair in pairs.items()]


@pytest.fixture(scope="session")
def random_examples() -> Callable[[int, int], list[Example]]:
    """A function that makes examples of 5 to 20 random tokens, given their number and a seed."""

    def make(count: int, seed: int) -> list[Example]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(5, 21, (count,), generator=generator).tolist()
        rows = [torch.randint(3, 260, (length,), generator=generator).tolist() for length in lengths]
        return [Example(row, [UNSUPERVISED] * PROMPT + row[PROMPT:]) for row in rows]

    return make


@pytest.fixture(scope="session")
def random_pairs(random_examples: Callable[[int, int], list[Example]]) -> Callable[[int, int], list[Preference]]:
    """A function that makes pairs of random answers to the same prompt, given their number and a seed."""

    def make(count: int, seed: int) -> list[Preference]:
        chosen, rejected = random_examples(count, seed), random_examples(count, seed + 1000)
        return [
            Preference(one, Example(one.tokens[:PROMPT] + other.tokens[PROMPT:], other.labels))
            for one, other in zip(chosen, rejected, strict=True)
        ]

    return make
