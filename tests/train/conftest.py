import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck.base.fingerprint import fingerprint
from loradeck.base.load import Base
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train.example import Example
from loradeck.train.record import Completion


@pytest.fixture
def base(tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    return Base(tiny, tiny_tokenizer, name="tiny", source="tiny", fingerprint=fingerprint(tiny))


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
