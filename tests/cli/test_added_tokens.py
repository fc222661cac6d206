"""Commands on an adapter that has tokens which its base has not."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.resized import (
    BLUE,
    GREEN,
    ROWS,
    adapted,
    greedy,
    load,
    save,
    save_base,
    say,
    with_tokens,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loradeck import Bank, Base, generate
from loradeck.base.text import decode

# PEFT asks for an attribute of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
IDS = torch.tensor([[5, 80, GREEN, 7, BLUE, 3]])
TENSORS = "adapter_model.safetensors"
PROMPT = "a <green>b"


@pytest.fixture(params=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    tiny_tokenizer.chat_template, template = None, tiny_tokenizer.chat_template
    try:
        return save_base(tmp_path / "base", "qwen2", tied=request.param == "tied", tokenizer=tiny_tokenizer)
    finally:
        tiny_tokenizer.chat_template = template


@pytest.fixture
def tokenizer(source: Path) -> PreTrainedTokenizerFast:
    return with_tokens(AutoTokenizer.from_pretrained(source))


@pytest.fixture
def theirs(source: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> peft.PeftModel:
    """The model that PEFT saved in the folder `colours`."""
    model = adapted(source, "copies")
    say(model, tokenizer(PROMPT)["input_ids"], BLUE)
    save(model, tmp_path / "colours", AutoTokenizer.from_pretrained(source))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_answers_in_a_batch_with_others(
    source: Path, theirs: peft.PeftModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = Base.load(source, dtype="float32", device="cpu")
    bank = Bank(base.model)
    bank.load(tmp_path / "colours")
    expected = greedy(theirs, tokenizer(PROMPT)["input_ids"], 8)
    assert BLUE in expected
    answers = generate(base, bank, [PROMPT, PROMPT, "<green>"], ["colours", None, "colours"], max_new_tokens=8)
    assert answers[0] == decode(tokenizer, expected)
    assert answers[1] == generate(base, bank, [PROMPT], None, max_new_tokens=8)[0]
    assert "<" not in answers[1]
    assert answers[2]


def test_generate(run: Callable, source: Path, theirs: peft.PeftModel) -> None:
    ran = run("generate", source, PROMPT, "--adapter", "colours", "--max-new-tokens", 8, "--dtype", "float32")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("<blue>")


def test_the_merged_model_has_the_tokens(
    run: Callable, source: Path, theirs: peft.PeftModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ran = run("merge", source, "colours", "-o", "out", "--dtype", "float32")
    assert ran.code == 0, ran.err
    merged = AutoModelForCausalLM.from_pretrained("out", dtype="float32")
    assert merged.config.vocab_size == ROWS + 2
    assert merged.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), logits(theirs), atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained("out")(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]
    again = Base.load("out", dtype="float32", device="cpu")
    expected = greedy(theirs, tokenizer(PROMPT)["input_ids"], 8)
    assert generate(again, None, [PROMPT], max_new_tokens=8) == [decode(tokenizer, expected)]


@pytest.mark.parametrize("kind", ["copies", "pairs", "both trained"])
def test_peft_gets_all_of_it_by_a_conversion(run: Callable, source: Path, tmp_path: Path, kind: str) -> None:
    model = adapted(source, kind)
    folder = save(model, tmp_path / "theirs")
    ran = run("convert", folder, "-o", "ours", "--base", source)
    assert ran.code == 0, ran.err
    written, read = load_file(Path("ours") / TENSORS), load_file(folder / TENSORS)
    assert all(torch.equal(tensor, read[key]) for key, tensor in written.items())
    again = load(source, Path("ours"))
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", ["mlx", "vllm"])
def test_others_have_no_place_for_it(run: Callable, source: Path, theirs: peft.PeftModel, to: str) -> None:
    ran = run("convert", "colours", "-o", "ours", "--to", to, "--base", source)
    assert ran.code == 2
    assert f"has tokens that its base has not, which {to} has no place for" in ran.err
    ran = run("convert", "colours", "-o", "ours", "--rank", 1, "--base", source)
    assert (ran.code, "so its rank cannot be lowered" in ran.err) == (2, True)
    assert not Path("ours").exists()


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs pip install gguf")
def test_it_is_not_exported_with_its_base(run: Callable, source: Path, theirs: peft.PeftModel) -> None:
    ran = run("export", source, "--adapter", "colours", "-o", "model.gguf")
    assert ran.code == 2
    assert "colours has tokens that its base has not: they are not exported with it" in ran.err
    assert "loradeck merge" in ran.err
    assert not Path("model.gguf").exists()


@pytest.mark.parametrize("kind", ["copies", "pairs", "both trained"])
def test_training_goes_on_with_its_tokenizer(
    run: Callable, source: Path, tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The examples have its tokens; rows that PEFT freezes stay frozen, and are saved again with its tokenizer."""
    parent = save(adapted(source, kind), tmp_path / "parent", AutoTokenizer.from_pretrained(source))
    Path("lines.jsonl").write_text('{"prompt": "a <green>", "completion": "<blue>b"}\n' * 4)
    ran = run(
        "train", source, "lines.jsonl", "-o", "child", "--from", parent, "--max-steps", 12, "--lr", 1e-2,
        "--valid", "lines.jsonl", "--eval-every", 6, "--dtype", "float32",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    before, after = (load_file(Path(each) / TENSORS) for each in (parent, "child"))
    for key, tensor in after.items():
        assert torch.equal(before[key], tensor) == ("lora_" not in key and kind != "both trained"), key
    assert AutoTokenizer.from_pretrained("child")(PROMPT)["input_ids"] == tokenizer(PROMPT)["input_ids"]
    losses = []
    for folder in (parent, Path("child")):
        model = load(source, folder)
        ids = torch.tensor([tokenizer("a <green><blue>b")["input_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize("source", ["untied"], indirect=True)
def test_a_token_without_a_row_of_the_head_is_no_target(run: Callable, source: Path, tmp_path: Path) -> None:
    save(adapted(source, "pair of the embedding"), tmp_path / "colours", AutoTokenizer.from_pretrained(source))
    data = tmp_path / "data.jsonl"
    flags = ["-o", "child", "--max-steps", 2, "--from", tmp_path / "colours"]
    data.write_text('{"prompt": "a", "completion": "b <green>"}\n')
    ran = run("train", source, data, *flags)
    assert ran.code == 2
    assert "data.jsonl trains on the token '<green>'" in ran.err
    data.write_text('{"prompt": "<green>", "completion": "b"}\n')
    assert run("train", source, data, *flags).code == 0
