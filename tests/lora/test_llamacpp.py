"""Exported adapters in llama.cpp itself, against the routed model.

llama.cpp is asked in a Python that has the package xllamacpp: this one, or the one that LORADECK_LLAMACPP names.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loradeck import Bank, Base, LoraConfig
from loradeck.base.load import SMOLLM2, SMOLLM2_PACKAGE
from loradeck.cli import main
from loradeck.cli.architecture import LLAMACPP_NAMES, read_architecture
from loradeck.lora.gguf import PLAIN, REORDERED, Architecture, export, names

PYTHON = os.environ.get("LORADECK_LLAMACPP") or (sys.executable if find_spec("xllamacpp") else "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="needs pip install xllamacpp, here or in the environment of LORADECK_LLAMACPP=…/bin/python"
)

Prompts = Sequence[Sequence[int]]
Answer = list[tuple[int, dict[int, float]]]
PIRATE = files("loradeck.demo") / "pirate.jsonl"
VOCABULARY, HEADS, KV_HEADS, HEAD = 96, 4, 2, 16
IDS = [[5, 80, 13, 7, 59, 3], [9, 9, 31, 64], [2, 71, 72, 73, 74, 75, 76, 77, 78]]
TEXTS = ["The capital of France is", "Once upon a time", "def add(a, b):\n    return", "Water boils at"]
MIXED = LoraConfig(  # ranks and scalings of all sorts
    r=8, lora_alpha=12, use_rslora=True, rank_pattern={"q_proj": 16, "down_proj": 3}, alpha_pattern={"o_proj": 40}
)
SLIDING = {"attention.sliding_window": 64}
# A kind of model -> what is its own in transformers' configuration, and in a GGUF file's header.
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma": ({}, {}),
    "gemma2": (
        {"query_pre_attn_scalar": HEAD, "sliding_window": 64},
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **SLIDING},
    ),
    "gemma3_text": ({"query_pre_attn_scalar": HEAD, "sliding_window": 64}, SLIDING),
    "granite": (
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0},
        {"attention.scale": 0.3, "embedding_scale": 3.0, "residual_scale": 0.6, "logit_scale": 2.0},
    ),
    "llama": ({"tie_word_embeddings": False}, {}),
    "mistral": ({"sliding_window": None}, {}),
    "olmo2": ({"tie_word_embeddings": False}, {}),
    "phi3": ({"sliding_window": 64}, SLIDING),
    "qwen2": ({}, {}),
    "qwen3": ({}, {}),
    "smollm3": ({}, {}),
}


def test_every_known_architecture_is_tried() -> None:
    assert {LLAMACPP_NAMES.get(kind, kind) for kind in OWN} == REORDERED | PLAIN


@pytest.mark.parametrize("kind", OWN)
def test_llama_cpp_computes_what_the_route_does(kind: str, tmp_path: Path) -> None:
    model = small(kind)
    model.save_pretrained(tmp_path / "base")
    base = read_architecture(str(tmp_path / "base"))
    write_base(model, base, OWN[kind][1], tmp_path / "base.gguf")
    assert read_architecture(str(tmp_path / "base.gguf")) == base
    bank = Bank(model)
    everything = "all-linear" if model.config.tie_word_embeddings else r".*(_proj|embed_tokens|lm_head)"
    bank.add("mixed", replace(MIXED, target_modules=everything))
    fill(bank, "mixed", 0.2)
    export(bank["mixed"], base, tmp_path / "mixed.gguf")
    within = 5e-3 if base.name.startswith("gemma") else 5e-4  # llama.cpp looks GELU up in a table of half precision
    for route, adapter in ((None, None), ("mixed", tmp_path / "mixed.gguf")):
        answers = ask(tmp_path / "base.gguf", adapter, IDS)
        assert max(far(bank, route, IDS, answers)) < within
        assert likeliest(bank, route, IDS, answers) == [[token for token, _ in answer] for answer in answers]
    assert min(far(bank, None, IDS, answers)) > 0.5


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, smollm2: Base) -> Iterator[tuple[Bank, Path]]:
    """SmolLM2 with one adapter trained by the command line, and one random of several ranks; and their GGUF files."""
    folder = tmp_path_factory.mktemp("exported")
    flags = "--max-steps 12 --batch-size 4 --learning-rate 2e-3 --r 8 --dtype float32 --target-modules"
    modules = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert main(["train", SMOLLM2, str(PIRATE), "-o", str(folder / "trained"), *flags.split(), modules]) == 0
    write_base(smollm2.model, read_architecture(SMOLLM2), {}, folder / "base.gguf")
    bank = Bank(smollm2.model)
    bank.add("random", MIXED)
    fill(bank, "random", 0.03)
    bank.save("random", folder / "random")
    bank.load(folder / "trained")
    for name in bank.names():
        assert main(["export", str(folder / name), "-o", str(folder / f"{name}.gguf")]) == 0
    yield bank, folder
    bank.detach()


@pytest.mark.real
@pytest.mark.parametrize("name", ["trained", "random"])
def test_the_real_base_in_full_precision(real: tuple[Bank, Path], smollm2: Base, name: str) -> None:
    bank, folder = real
    prompts = [smollm2.tokenizer(text)["input_ids"] for text in TEXTS]
    answers = ask(folder / "base.gguf", folder / f"{name}.gguf", prompts)
    assert max(far(bank, name, prompts, answers)) < 2e-3
    assert likeliest(bank, name, prompts, answers) == [[token for token, _ in answer] for answer in answers]
    assert min(far(bank, None, prompts, answers)) > 0.5


@pytest.mark.real
@pytest.mark.parametrize("name", ["trained", "random"])
def test_the_real_base_as_users_have_it(real: tuple[Bank, Path], smollm2: Base, name: str) -> None:
    """On quantised weights llama.cpp rounds what it computes with: no more with an adapter than without one."""
    bank, folder = real
    package = find_spec(SMOLLM2_PACKAGE)
    assert package
    (base,) = Path(str(package.origin)).parent.glob("*.gguf")
    prompts = [smollm2.tokenizer(text)["input_ids"] for text in TEXTS]
    rounding = mean(far(bank, None, prompts, ask(base, None, prompts)))
    answers = ask(base, folder / f"{name}.gguf", prompts)
    assert mean(far(bank, name, prompts, answers)) < 1.5 * rounding
    assert mean(far(bank, None, prompts, answers)) > 4 * rounding
    ours, theirs = likeliest(bank, name, prompts, answers), [[token for token, _ in answer] for answer in answers]
    same = sum(one == two for row, other in zip(ours, theirs, strict=True) for one, two in zip(row, other, strict=True))
    assert same >= 0.9 * sum(map(len, ours))


def small(kind: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{"tie_word_embeddings": True, **OWN[kind][0]},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() == 1:  # norms and biases, which begin as ones and zeros
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def write_base(model: PreTrainedModel, base: Architecture, own: dict[str, Any], file: Path) -> None:
    """Write a model as a GGUF file in float32, with a vocabulary of numbers."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, base.name)
    rope = getattr(config, "rope_parameters", None) or {}
    header = {
        "context_length": 256,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": base.heads,
        "attention.head_count_kv": base.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        **own,
    }
    for key, value in header.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{base.name}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["< 0"])
    writer.add_eos_token_id(2)
    known = names(base.name, base.blocks)
    for path, weight in model.named_parameters():
        name = known.get_name(path, try_suffixes=(".weight", ".bias"))
        assert name, path
        if base.name.startswith("gemma") and "norm" in name:  # transformers multiplies by 1 + weight
            weight = weight + 1
        writer.add_tensor(name, base.reorder(name, weight).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fill(bank: Bank, name: str, size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bank.parameters(name):
            parameter.normal_(0, size, generator=generator)


def ask(base: Path, adapter: Path | None, prompts: Prompts) -> list[Answer]:
    """Return llama.cpp's greedy answers: for each new token its id and the log-probabilities of the likeliest 20."""
    asked = {"base": str(base), "adapter": str(adapter or ""), "prompts": prompts, "tokens": 8, "top": 20}
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("llamacpp.py")], input=json.dumps(asked), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [
        [(token, {int(key): value for key, value in top.items()}) for token, top in answer]
        for answer in json.loads(done.stdout)
    ]


def far(bank: Bank, route: str | None, prompts: Prompts, answers: Sequence[Answer]) -> list[float]:
    """Return for each answer the largest difference of a log-probability from ours."""
    return [
        max(
            abs(float(ours[key]) - value)
            for ours, (_, top) in zip(log_probabilities(bank, route, *each), each[1], strict=True)
            for key, value in top.items()
        )
        for each in zip(prompts, answers, strict=True)
    ]


def likeliest(bank: Bank, route: str | None, prompts: Prompts, answers: Sequence[Answer]) -> list[list[int]]:
    return [log_probabilities(bank, route, *each).argmax(-1).tolist() for each in zip(prompts, answers, strict=True)]


@torch.no_grad()
def log_probabilities(bank: Bank, route: str | None, prompt: Sequence[int], answer: Answer) -> Tensor:
    """Return (steps of the answer, vocabulary), each step after the tokens that llama.cpp chose before it."""
    ids = torch.tensor([[*prompt, *(token for token, _ in answer)]])
    with bank.route(route):
        logits = bank.model(ids).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)
