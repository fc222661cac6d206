"""How llama.cpp's files name and order a model's weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from gguf import TensorNameMap

# Architectures whose q and k have another order of rows in llama.cpp, and those whose weights are the same.
REORDERED = frozenset({"granite", "llama", "smollm3"})
PLAIN = frozenset({"gemma", "gemma2", "gemma3", "olmo2", "phi3", "qwen2", "qwen3"})
GEMMA = frozenset({"gemma", "gemma2", "gemma3"})  # their norms multiply by 1 + weight; llama.cpp's by the weight
MODEL_TYPES = {"gemma3": "gemma3_text"}  # transformers' model_type, where it differs
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FACTORS = "rope_freqs.weight"  # what llama3's RoPE divides each frequency by


@dataclass(frozen=True, slots=True)
class Architecture:
    """A base as in llama.cpp: its name, its heads, and the shape (out, in) of each weight by llama.cpp's name."""

    name: str
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        for name, (rows, *_) in self.shapes.items():
            heads = self._heads_of(name, default=1)
            if not isinstance(heads, int) or heads < 1 or rows % heads:
                raise ValueError(f"{name} has {rows} rows, and {heads} heads")

    @property
    def blocks(self) -> int:
        """Number of layers."""
        numbers = (re.match(r"blk\.(\d+)\.", name) for name in self.shapes)
        return 1 + max((int(number[1]) for number in numbers if number), default=-1)

    def reorder(self, name: str, rows: Tensor) -> Tensor:
        """Return a weight's rows, or those of a B (out, r), in llama.cpp's order.

        Its RoPE rotates neighbours; that of transformers rotates the two halves of a head.
        """
        heads = self._heads_of(name, default=0)
        if self.name not in REORDERED or not heads:
            return rows
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def file_rows(self, name: str, rows: int) -> Tensor | None:
        """Return, for each row of a weight as transformers has it, its row in the file; None if they are the same."""
        places = torch.arange(rows)
        order = self.reorder(name, places)
        return None if order is places else order.argsort()

    def _heads_of(self, weight: str, default: int) -> int:
        return {"attn_q": self.heads, "attn_k": self.kv_heads}.get(weight.split(".")[-2], default)


def check_installed(what: str) -> None:
    """Check that the package gguf is there; `what` needs it.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("gguf") is None:
        raise ConfigError(f"{what} needs the package gguf", hint="Run pip install 'loradeck[gguf]'.")


def names(architecture: str, blocks: int) -> "TensorNameMap":
    """Return gguf's map from weight names in transformers to those in llama.cpp."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(kinds[architecture], blocks)


def text_path(path: str) -> str:
    """Return a module's path in the language model, which is all that llama.cpp has of a multimodal base here."""
    return path.replace("language_model.", "", 1)
