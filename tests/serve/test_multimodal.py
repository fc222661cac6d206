"""The language models of multimodal bases behind the engine, with adapters that PEFT made on the whole model."""

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from tests.multimodal import FAMILIES, SUPPORT, VOCABULARY, adapted, text_logits, whole
from torch import nn
from transformers import PreTrainedTokenizerFast

from loradeck import AdapterStore, Bank, Base, generate
from loradeck.base.text import decode, stop_ids
from loradeck.errors import BaseModelError
from loradeck.runner.model_runner import ModelRunner
from loradeck.runner.native_runner import NativeRunner
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

from .conftest import ids

TOKENS = 8
RUNNERS = {"compiled step": NativeRunner, "transformers' modules": ModelRunner}


@pytest.fixture
def load(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Base]:
    def load(family: str) -> Base:
        whole(family).save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        return Base.load(tmp_path / "base", dtype="float32", device="cpu")

    return load


def continued(model: nn.Module, prompt: list[int]) -> list[int]:
    """The likeliest next tokens by the whole model, each from a forward over all before it."""
    tokens = [*prompt]
    for _ in range(TOKENS):
        tokens.append(int(text_logits(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_and_generate_continue_as_the_whole_model_does(
    load: Callable[[str], Base], tmp_path: Path, family: str
) -> None:
    models = {None: whole(family)} | {name: adapted(family, tmp_path / name, seed) for seed, name in enumerate("ab")}
    base = load(family)
    generator = torch.Generator().manual_seed(7)
    entries = [None, "a", "b", "a", None]
    prompts = [torch.randint(3, VOCABULARY, (5 + 4 * i,), generator=generator).tolist() for i in range(len(entries))]
    expected = [continued(models[entry], prompt) for entry, prompt in zip(entries, prompts, strict=True)]
    bank = Bank(base.model)
    for name in "ab":
        bank.load(tmp_path / name)
    texts = generate(base, bank, prompts, entries, max_new_tokens=TOKENS)
    bank.detach()
    ends = stop_ids(base.tokenizer, base.model.generation_config)
    assert texts == [decode(base.tokenizer, takewhile(lambda token: token not in ends, tokens)) for tokens in expected]
    store = AdapterStore(tmp_path / "store")
    for name in "ab":
        store.publish(name, tmp_path / name)
    served = SUPPORT[family][2]
    if served.startswith("no"):
        with pytest.raises(BaseModelError, match="cannot be served: not all of its layers have an attention"):
            Engine(base, store)
        return
    with Engine(base, store, EngineConfig(max_rows=4, max_step_tokens=16)) as engine:
        assert type(engine._runner) is RUNNERS[served]
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        assert [ids(answer) for answer in engine.generate(prompts, entries, params)] == expected
