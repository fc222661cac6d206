"""The same code on a GPU: the operation, a routed model, loading, training and serving. Skipped where there is none."""

from pathlib import Path

import pytest
import torch
from benchmarks.suites import ops
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck import Adapter, AdapterStore, Bank, Base, LoraConfig
from loradeck.base.fingerprint import fingerprint
from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.train.config import TrainConfig
from loradeck.train.trainer import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda", 0)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16], [17, 18]]
ENTRIES = [None, "a0", {"a1": 0.7, "a0": 0.3}, "a2"]


@pytest.fixture
def base(tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    return Base(tiny.to(DEVICE), tiny_tokenizer, "tiny", "org/tiny", fingerprint(tiny))


@pytest.fixture
def store(base: Base, tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    for i in range(3):
        store.publish(f"a{i}", made(base, i))
    return store


def made(base: Base, seed: int) -> Adapter:
    bank = Bank(base.model)
    own = bank.add("made", LoraConfig(r=2 + 3 * seed, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    copy = Adapter.of(own.config, {path: own.pair(path) for path in own.sites})
    bank.detach()
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_is_the_definition(dtype: torch.dtype) -> None:
    """Every mix, forwards and gradients, against float64; the Triton kernels among them."""
    errors = ops.errors([(96, 64), (2048, 1030)], dtype, DEVICE) | ops.errors_of_other_kinds(DEVICE)
    assert {name.split(",")[0] for name in errors} >= {"reference", "portable", "dispatch"}


def test_a_mixed_batch_is_each_row_alone(base: Base, store: AdapterStore) -> None:
    bank = Bank(base.model)
    for name in ("a0", "a1", "a2"):
        bank.load(store.find(name).path, name)
        assert {tensor.device for path in bank[name].sites for tensor in bank[name].pair(path)} == {DEVICE}
    ids = torch.randint(3, 260, (4, 9), device=DEVICE)
    with torch.no_grad():
        with bank.route(ENTRIES):
            together = base.model(ids).logits
        for row, entry in enumerate(ENTRIES):
            with bank.route(entry):
                alone = base.model(ids[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
    bank.detach()


def test_training_is_the_cpus(base: Base, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = torch.randint(3, 260, (6, 12), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [Example(row, [UNSUPERVISED, *row[1:]]) for row in rows]
    config = TrainConfig(max_steps=4, batch_size=3, learning_rate=1e-3)
    losses = []
    for device in (DEVICE, torch.device("cpu")):
        base.model.to(device)  # type: ignore[arg-type]
        bank = Bank(base.model)
        bank.add("own", LoraConfig(r=4), generator=torch.Generator().manual_seed(0))
        losses.append(train(base, bank, "own", examples, config).losses)
        bank.detach()
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_an_engine_says_what_each_request_alone_gets(base: Base, store: AdapterStore) -> None:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    with Engine(base, store, EngineConfig(max_rows=4)) as engine:
        together = engine.generate(PROMPTS, ENTRIES, sampling)
        alone = [
            engine.generate([prompt], [entry], sampling)[0] for prompt, entry in zip(PROMPTS, ENTRIES, strict=True)
        ]
    assert [[token.id for token in own] for own in together] == [[token.id for token in own] for own in alone]
