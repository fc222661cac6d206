import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loradeck.base.load import Base
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig

ADAPTERS = {"poet": LoraConfig(r=4), "pirate": LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"])}
RECORDS = [
    {"prompt": "Hi", "completion": "Ahoy!"},
    {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Fair winds, matey"}]},
    {"instruction": "2+2?", "output": "4"},
    {"text": "The sea, the sea"},
]
PAIRS = [
    {"prompt": "Hi", "chosen": "Ahoy!", "rejected": "Hello."},
    {"prompt": "Sea?", "chosen": "Aye, the sea", "rejected": "Water"},
    {"prompt": "Bye", "chosen": "Fair winds", "rejected": "Goodbye, sir"},
]


@pytest.fixture
def bank(base: Base) -> Bank:
    """A bank with `poet` and `pirate`, which change the output."""
    bank = Bank(base.model)
    generator = torch.Generator().manual_seed(0)
    for name, config in ADAPTERS.items():
        bank.add(name, config)
        with torch.no_grad():
            for parameter in bank.parameters(name):
                parameter.normal_(0, 0.2, generator=generator)
    return bank


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes records as a file of JSON lines."""

    def write(records: list[dict], name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    return write
