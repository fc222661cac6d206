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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from loradeck import Adapter, Bank, Base, LoraConfig
from loradeck.base.load import SMOLLM2, SMOLLM2_PACKAGE
from loradeck.cli import main
from loradeck.gguf.adapter import export, read
from loradeck.gguf.architecture import LLAMACPP_NAMES, read_architecture
from loradeck.gguf.model import Merge, Model, load_adapters
from loradeck.gguf.model import export as export_model
from loradeck.llamacpp import PLAIN, REORDERED

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
# A kind of model -> what is its own in transformers' configuration.
OWN: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": HEAD, "sliding_window": 6},
    "gemma3_text": {"query_pre_attn_scalar": HEAD, "sliding_window": 6, "num_hidden_layers": 7},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": None},
    "olmo2": {"tie_word_embeddings": False},
    "phi3": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"num_hidden_layers": 5},
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
}


@pytest.fixture(scope="module")
def numbers() -> PreTrainedTokenizerFast:
    """A tokenizer whose every token is whole characters: llama.cpp's server holds the others' probabilities back."""
    vocabulary = ["a", "b", "ab", *(f"<{number}>" for number in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.BPE({token: at for at, token in enumerate(vocabulary)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="ab")


def test_every_known_architecture_is_tried() -> None:
    assert {LLAMACPP_NAMES.get(kind, kind) for kind in OWN} == REORDERED | PLAIN


@pytest.mark.parametrize("kind", OWN)
def test_llama_cpp_computes_what_the_route_does(kind: str, tmp_path: Path, numbers: PreTrainedTokenizerFast) -> None:
    model = small(kind)
    write_base(model, numbers, tmp_path)
    base = read_architecture(str(tmp_path / "base"))
    assert read_architecture(str(tmp_path / "base.gguf")) == base
    bank = Bank(model)
    everything = "all-linear" if model.config.tie_word_embeddings else r".*(_proj|embed_tokens|lm_head)"
    bank.add("mixed", replace(MIXED, target_modules=everything))
    fill(bank, "mixed", 0.2)
    export(bank["mixed"], base, tmp_path / "mixed.gguf")
    back = read(tmp_path / "mixed.gguf", base)
    assert back.sites.keys() == bank["mixed"].sites.keys()
    for path in back.sites:
        torch.testing.assert_close(update(back, path), update(bank["mixed"], path), rtol=1e-5, atol=1e-5)
    bank.save("mixed", tmp_path / "mixed")
    write_model(tmp_path / "base", tmp_path / "merged.gguf", {str(tmp_path / "mixed"): 1.0})
    within = 5e-3 if base.name.startswith("gemma") else 5e-4  # llama.cpp looks GELU up in a table of half precision
    for route, file, adapter in (
        (None, "base", None),
        ("mixed", "base", tmp_path / "mixed.gguf"),
        ("mixed", "merged", None),
    ):
        answers = ask(tmp_path / f"{file}.gguf", adapter, IDS)
        assert max(far(bank, route, IDS, answers)) < within
        assert likeliest(bank, route, IDS, answers) == [[token for token, _ in answer] for answer in answers]
    assert min(far(bank, None, IDS, answers)) > 0.5


@pytest.mark.parametrize("rope", ROPES)
def test_llama_cpp_scales_positions_as_the_base(rope: str, tmp_path: Path, numbers: PreTrainedTokenizerFast) -> None:
    model = small("llama", rope_parameters=ROPES[rope])
    write_base(model, numbers, tmp_path)
    prompts = [[(7 * at) % 90 + 3 for at in range(1, 100)]]
    assert max(far(Bank(model), None, prompts, ask(tmp_path / "base.gguf", None, prompts))) < 5e-4


def test_llama_cpp_reads_texts_as_the_tokenizer(
    tmp_path: Path, bpe_folder: Path, spaced_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_model(bpe_folder, tmp_path / "bpe.gguf")
    write_base(small("llama", vocab_size=len(spaced_tokenizer)), spaced_tokenizer, tmp_path)
    texts = [*TEXTS, "abc aab  bca\n\tcb", " a", "é, naïve — 1234567, don't!", "<|im_start|>user\nthe<|im_end|>"]
    for file, tokenizer in (("bpe", AutoTokenizer.from_pretrained(bpe_folder)), ("base", spaced_tokenizer)):
        assert tokenize(tmp_path / f"{file}.gguf", texts) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, smollm2: Base) -> Iterator[tuple[Bank, Path]]:
    """SmolLM2 with one adapter trained by the command line, and one random of several ranks; and their GGUF files."""
    folder = tmp_path_factory.mktemp("exported")
    flags = "--max-steps 12 --batch-size 4 --learning-rate 2e-3 --r 8 --dtype float32 --target-modules"
    modules = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert main(["train", SMOLLM2, str(PIRATE), "-o", str(folder / "trained"), *flags.split(), modules]) == 0
    write_model(SMOLLM2, folder / "base.gguf")
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


def small(kind: str, **settings: Any) -> PreTrainedModel:
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    config = AutoConfig.for_model(kind, **{**defaults, **OWN[kind], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() == 1:  # norms and biases, which begin as ones and zeros
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def write_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model as a folder of transformers, `base`, and as a GGUF file in float32, `base.gguf`."""
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_model(folder / "base", folder / "base.gguf")


def write_model(base: Path | str, file: Path, adapters: dict[str, float] | None = None) -> None:
    model = Model.open(str(base))
    export_model(model, load_adapters(model, adapters) if adapters else Merge(), file, "f32")


def fill(bank: Bank, name: str, size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bank.parameters(name):
            parameter.normal_(0, size, generator=generator)


def update(adapter: Adapter, path: str) -> Tensor:
    a, b = adapter.pair(path)
    return adapter.sites[path].scaling * b.detach() @ a.detach()


def tokenize(base: Path, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens that llama.cpp reads texts as."""
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("llamacpp.py")],
        input=json.dumps({"base": str(base), "adapter": "", "texts": texts}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


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
