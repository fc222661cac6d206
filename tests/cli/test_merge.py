from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.multimodal import FAMILIES, adapted, text_logits, whole
from tests.own_tokenizers import PLAIN, with_other_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck.base import load
from loradeck.base.load import Base
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.pooling import classify

from .conftest import fill

IDS = torch.tensor([[5, 80, 130, 7, 259, 3]])


@pytest.fixture
def tied_folder(tmp_path: Path, tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    tiny.config.tie_word_embeddings = True
    tiny.tie_weights()
    tiny.save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "tiny"])
@pytest.mark.parametrize("written", ["adapters/poet", "adapters/pirate", "adapters/poet*0.7+adapters/pirate*-0.3"])
def test_the_merged_model_computes_what_the_route_did(
    run: Callable, adapters: Path, request: pytest.FixtureRequest, kind: str, written: str
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    ran = run("merge", folder, written, "-o", "out", "--dtype", "float32")
    assert ran.code == 0, ran.err
    assert "loradeck generate out" in ran.out
    base = Base.load(folder, dtype="float32", device="cpu")
    bank = Bank(base.model)
    weights = {"adapters/poet": {"poet": 1.0}, "adapters/pirate": {"pirate": 1.0}}
    for name in ("poet", "pirate"):
        bank.load(adapters / name)
    merged = AutoModelForCausalLM.from_pretrained("out", dtype="float32")
    with torch.no_grad(), bank.route(weights.get(written, {"poet": 0.7, "pirate": -0.3})):
        expected = base.model(IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, base.model(IDS).logits, atol=1e-2)
    assert AutoTokenizer.from_pretrained("out")("Hi")["input_ids"] == base.tokenizer("Hi")["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_multimodal_base_the_language_model_is_merged(
    run: Callable, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    whole(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    expected = text_logits(adapted(family, tmp_path / "poet"), IDS)
    ran = run("merge", "base", "poet", "-o", "out", "--dtype", "float32")
    assert ran.code == 0, ran.err
    for model in (AutoModelForCausalLM.from_pretrained("out"), Base.load("out", dtype="float32", device="cpu").model):
        assert not hasattr(model.config, "vision_config")
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_adapters_own_tokenizer_is_the_merged_models(
    run: Callable, tiny_folder: Path, adapters: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    own = with_other_ids(tiny_tokenizer, chat_template=PLAIN)
    own.save_pretrained(adapters / "poet")
    assert run("merge", tiny_folder, adapters / "poet", "-o", "out").code == 0
    merged = AutoTokenizer.from_pretrained("out")
    assert (merged("Hi")["input_ids"], merged.chat_template) == (own("Hi")["input_ids"], PLAIN)


def test_a_classifier_is_merged_with_its_head_and_labels(
    run: Callable, tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path
) -> None:
    base = Base.load(tiny_folder, dtype="float32", device="cpu", task="classify")
    bank = Bank(base.model)
    bank.add("mood", LoraConfig(r=2, modules_to_save=["score"]), num_labels=3)
    fill(bank["mood"], 3)
    bank["mood"].get_parameter("score/weight").data.mul_(0.1)
    bank["mood"].describe(labels='["calm", "angry", "sad"]')
    bank.save("mood", tmp_path / "mood")
    probabilities = classify(base, bank, ["Hi", "Ho"], "mood")
    ran = run("merge", tiny_folder, "mood", "-o", "merged", "--task", "classify", "--dtype", "float32")
    assert ran.code == 0, ran.err
    assert ran.out.endswith("try: loradeck serve merged --task classify\n")
    merged = Base.load(tmp_path / "merged", dtype="float32", device="cpu", task="classify")
    assert merged.model.config.id2label == {0: "calm", 1: "angry", 2: "sad"}
    for ours, theirs in zip(classify(merged, None, ["Hi", "Ho"]), probabilities, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    ran = run("merge", tiny_folder, "mood", "-o", "other")
    assert (ran.code, "score is not a module of this base" in ran.err) == (2, True), ran.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_gguf_file_is_merged_in_plain_weights(
    run: Callable, bpe_folder: Path, adapters: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks are decoded, and the sum is rounded once to the dtype."""
    monkeypatch.setattr(load, "computes_in", lambda *_: dtype == "bfloat16")  # what `auto` is
    assert run("export", bpe_folder, "-o", "base.gguf", "--quant", "q4_1").code == 0
    assert run("merge", "base.gguf", adapters / "poet", "-o", "out", "--any-base").code == 0
    merged = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    assert str(merged.dtype) == f"torch.{dtype}"
    base = Base.load("base.gguf", dtype="float32", device="cpu")
    bank = Bank(base.model)
    bank.merge(bank.load(adapters / "poet", any_base=True))
    for path, weight in merged.named_parameters():
        expected = base.model.get_parameter(path)
        assert (weight.float() - expected).abs().max() <= 2**-7 * expected.abs().max(), path


def test_existing_files_are_left_alone(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    ran = run("merge", tiny_folder, adapters / "poet", "-o", "out")
    assert ran.code == 2
    assert "out exists and is not empty" in ran.err
    assert [path.name for path in Path("out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("written", ["none", "nowhere", "adapters/cut", "adapters/poet*x", "adapters/poet*inf"])
def test_a_bad_adapter_is_refused_and_nothing_is_written(
    run: Callable, tiny_folder: Path, adapters: Path, written: str
) -> None:
    ran = run("merge", tiny_folder, written, "-o", "out")
    assert ran.code == 2
    assert ran.err
    assert not Path("out").exists()


def test_a_bad_base_is_refused(run: Callable, adapters: Path) -> None:
    assert run("merge", adapters / "poet", adapters / "poet", "-o", "out").code == 2
