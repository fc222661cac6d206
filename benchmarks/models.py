"""What is measured: bases of random weights in the shapes of known models, and random adapters for any base."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from loradeck import Adapter, AdapterStore, LoraConfig
from loradeck.base.frozen import FrozenLinear


def llama(factor: float | None = None, **sizes: Any) -> LlamaConfig:
    """Return a config of Llama 3; `factor` scales its rotary frequencies."""
    rope: dict[str, Any] = {"rope_theta": 500000.0, "rope_type": "default"}
    if factor:
        scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
    common: dict[str, Any] = {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    return LlamaConfig(rope_parameters=rope, **(common | sizes))


# The sizes are those of config.json in meta-llama/Llama-3.2-1B and meta-llama/Llama-3.1-8B.
SHAPES: dict[str, Callable[[], LlamaConfig]] = {
    "Llama-3.2-1B": partial(
        llama, 32.0, vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": partial(
        llama, 8.0, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
    "tiny": partial(
        llama, vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip
WORDS = [f"word{number}" for number in range(250)]
LLAMAS = ("Llama-3.2-1B", "Llama-3.1-8B")


def random_model(shape: str, device: torch.device) -> Any:
    """Return a frozen model of a shape with random weights, in bfloat16 on a GPU and in float32 on a CPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def save_random_base(shape: str, folder: Path) -> Path:
    """Save a base of random weights, in float32; return the folder."""
    random_model(shape, torch.device("cpu")).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows only whole words."""
    tokens = ["<unk>", "<end>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return a model's linear layers by path, without the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    modules = model.named_modules()
    return {path: module for path, module in modules if isinstance(module, nn.Linear) and module is not head}


class RandomAdapters:
    """Makes adapters of random numbers for one model."""

    def __init__(self, model: nn.Module) -> None:
        layers = linear_layers(model)
        self.shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
        self._norms = {path: _norm(layer) for path, layer in layers.items()}

    def make(
        self,
        seed: int,
        config: LoraConfig,
        *,
        dtype: torch.dtype = torch.float32,
        strength: float = 0.1,
        paths: list[str] | None = None,
    ) -> Adapter:
        """Return the seed's adapter, on all linear layers or on those of `paths`.

        `strength` is the size of the update B A x over that of W x; with 0 B is 0, as in an adapter that is new.
        """
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for path in self.shapes if paths is None else paths:
            rows, columns = self.shapes[path]
            a = torch.randn(config.r, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, config.r, generator=generator)
            scale = strength * self._norms[path] / (rows * config.r) ** 0.5 / config.scaling(path, config.r)
            pairs[path] = a.to(dtype), (b * scale).to(dtype)
        return Adapter.of(config, pairs)


def random_store(
    model: nn.Module, folder: Path, *, count: int, r: int, dtype: torch.dtype = torch.float32
) -> AdapterStore:
    """Return a store of the adapters a0, a1, … on all linear layers."""
    store, adapters = AdapterStore(folder), RandomAdapters(model)
    for i in range(count):
        store.publish(f"a{i}", adapters.make(i, LoraConfig(r=r), dtype=dtype))
    return store


def _norm(layer: nn.Linear) -> float:
    weight = layer.dense() if isinstance(layer, FrozenLinear) else layer.weight  # packed and int8 weights
    return float(weight.detach().float().norm())
