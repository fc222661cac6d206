"""Resident memory that 100 loaded adapters add, over their tensors' bytes; in a process of its own, run by `adapters`.

    python -m benchmarks.suites._adapter_memory FOLDER

The model has SmolLM2-135M's shapes and no weights: memory freed earlier would hide what a load takes.
"""

import gc
import json
import sys

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loradeck import Bank

COUNT = 100


def main(folder: str) -> None:
    shapes = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shapes)
    model.to_empty(device="cpu")
    bank = Bank(model)
    for i in range(5):
        bank.load(folder, f"warm {i}")
    gc.collect()
    before = psutil.Process().memory_info().rss
    for i in range(COUNT):
        bank.load(folder, f"a{i}")
    gc.collect()
    added = (psutil.Process().memory_info().rss - before) / COUNT
    nbytes = bank["a0"].nbytes
    print(json.dumps({"tensor_bytes": nbytes, "added per adapter / its bytes": added / nbytes}))


if __name__ == "__main__":
    main(sys.argv[1])
