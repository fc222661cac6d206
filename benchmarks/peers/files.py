"""The adapters and prompts that all systems load."""

import json
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.models import RandomAdapters
from benchmarks.peers.workload import LONGEST, ROWS, Folder
from loradeck import LoraConfig
from loradeck.gguf.adapter import export
from loradeck.gguf.architecture import read_architecture


def save_adapters(folder: Folder, model: Any, count: int) -> None:
    """Save random adapters of r=8 on all linear layers, in the dtype in which a model computes."""
    architecture, adapters = read_architecture(str(folder.coarse_gguf)), RandomAdapters(model)
    for i in range(count):
        path = folder.path / f"a{i:02d}"
        adapter = adapters.make(i, LoraConfig(r=8), dtype=model.dtype)
        adapter.save(path)
        kind = "float32" if model.dtype == torch.float32 else "float16"
        export(adapter, architecture, path.with_suffix(".gguf"), dtype=kind)


def save_prompts(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save prompts of Python's documentation; each begins with the token that begins a text, if there is one."""
    tokens: list[int] = tokenizer("\n\n".join(topics.values()))["input_ids"]
    begin = tokens[:1] if tokens[0] == tokenizer.bos_token_id else []
    step = LONGEST - len(begin)
    text = tokens[len(begin) :]
    prompts = [[*begin, *text[i * step : (i + 1) * step]] for i in range(ROWS)]
    assert len(prompts[-1]) == LONGEST, "the text is too short"
    (folder.path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
