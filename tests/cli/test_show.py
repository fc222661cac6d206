import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.own_tokenizers import PLAIN, with_other_ids
from tests.resized import adapted, save, save_base
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig


@pytest.fixture
def classifier(tiny: LlamaForCausalLM) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(tiny.config).requires_grad_(False)


def test_it_shows_settings_modules_and_provenance(run: Callable, adapters: Path) -> None:
    ran = run("show", adapters / "pirate")
    assert ran.code == 0
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["r", "8"] in lines
    assert ["lora_alpha", "8"] in lines
    assert ["model.layers.*.self_attn.q_proj", "2", "linear", "8", "1", "(8,", "64)", "(64,", "8)"] in lines
    assert ["model.embed_tokens", "1", "embedding", "8", "1", "(8,", "260)", "(64,", "8)"] in lines
    assert any(line[:1] == ["torch"] for line in lines)


def test_json(run: Callable, adapters: Path) -> None:
    report = json.loads(run("show", adapters / "poet", "--json").out)
    assert report["config"]["r"] == 4
    assert sum(kind["count"] for kind in report["kinds"]) == 14
    assert all(kind["scaling"] == 8 for kind in report["kinds"])
    assert report["dtypes"] == ["F32"]
    assert "loradeck" in report["provenance"]


def test_heads_have_their_shapes_and_labels(
    run: Callable, tmp_path: Path, classifier: LlamaForSequenceClassification
) -> None:
    bank = Bank(classifier)
    bank.add("mood", LoraConfig(r=2, modules_to_save=["score"]), num_labels=3)
    bank["mood"].describe(labels='["calm", "angry", "sad"]')
    bank.save("mood", tmp_path / "mood")
    lines = [line.split() for line in run("show", "mood").out.splitlines()]
    assert ["labels", "3:", "calm,", "angry,", "sad"] in lines
    assert lines[-2:] == [["whole", "module", "parameter", "shape"], ["score", "weight", "(3,", "64)"]]
    report = json.loads(run("show", "mood", "--json").out)
    assert report["labels"] == ["calm", "angry", "sad"]
    assert report["whole_weights"] == {"score": {"weight": [3, 64]}}


def test_without_a_head_nothing_is_said_of_one(run: Callable, adapters: Path) -> None:
    ran = run("show", adapters / "poet")
    assert "labels" not in ran.out
    assert "whole module" not in ran.out
    report = json.loads(run("show", adapters / "poet", "--json").out)
    assert (report["labels"], report["whole_weights"]) == ([], {})


def test_its_own_tokenizer_is_compared_with_the_bases(
    run: Callable, adapters: Path, tiny_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = adapters / "poet"
    assert json.loads(run("show", folder, "--json").out)["tokenizer"] is None
    assert "tokenizer" not in run("show", folder).out
    (folder / "chat_template.jinja").write_text(PLAIN)
    ran = run("show", folder)
    assert "chat_template.jinja (" in ran.out
    assert "give --base BASE to see how it differs from the base's" in ran.out
    with_other_ids(tiny_tokenizer, eos_token="<|endoftext|>", chat_template=PLAIN).save_pretrained(folder)
    ran = run("show", folder, "--base", tiny_folder)
    assert ran.code == 0, ran.err
    for line in (
        "chat_template.jinja, tokenizer.json, tokenizer_config.json (",
        "256 with other ids: Ń, ł, Ł and 253 others",
        "eos is <|endoftext|>, not <|im_end|>",
        "another one",
    ):
        assert line in ran.out
    report = json.loads(run("show", folder, "--base", tiny_folder, "--json").out)["tokenizer"]
    assert {*report["differences"]} == {"vocabulary", "special tokens", "chat template"}
    tiny_tokenizer.save_pretrained(folder)
    config = folder / "adapter_config.json"
    named = {**json.loads(config.read_text()), "base_model_name_or_path": str(tiny_folder)}
    config.write_text(json.dumps(named))
    assert "equal to that of" in run("show", folder).out
    report = json.loads(run("show", folder, "--json").out)["tokenizer"]
    assert (report["base"], report["differences"]) == (str(tiny_folder), {})
    config.write_text(json.dumps({**named, "base_model_name_or_path": str(adapters)}))
    assert "give --base BASE" in run("show", folder).out  # that is no base
    assert run("show", folder, "--base", adapters).code == 2
    config.write_text(json.dumps(named))
    (folder / "tokenizer.json").write_text("{")
    ran = run("show", folder)
    assert ran.code == 0
    assert "cannot be used: " in ran.out


def test_other_folders_are_refused(run: Callable, adapters: Path, tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "holds no adapter_config.json"), (adapters / "cut", "cut")):
        ran = run("show", folder)
        assert ran.code == 2
        assert ran.out == ""
        assert message in ran.err


@pytest.mark.parametrize(
    "command",
    [
        ("show", "{}"), ("diff", "{}", "adapters/poet"), ("publish", "{}", "store/x"),
        ("generate", "nothing", "x", "--adapter", "{}"), ("merge", "nothing", "{}", "-o", "out"),
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_file_or_the_folder_above_is_said_to_be_that(run: Callable, adapters: Path, command: tuple[str, ...]) -> None:
    """In one line, by every verb, before a base is loaded."""
    for path, text, hint in (
        (
            "adapters/poet/adapter_model.safetensors",
            "is a file, not an adapter's folder",
            "Give its folder: adapters/poet",
        ),
        (
            "adapters",
            "holds no adapter_config.json itself, but folders with adapters: cut, pirate, poet",
            "adapters/poet",
        ),
    ):
        ran = run(*(part.format(path) for part in command))
        assert ran.code == 2
        assert f"{path} {text}" in ran.err
        assert ran.err.rstrip().endswith(hint)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for the old name
def test_tokens_that_the_base_has_not(run: Callable, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    base = save_base(tmp_path / "base", "llama", tied=False, tokenizer=tiny_tokenizer)
    folder = save(adapted(base, "both trained"), tmp_path / "colours", tiny_tokenizer)
    ran = run("show", folder)
    assert ran.code == 0, ran.err
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert {"lm_head weight (262, 64)", "model.embed_tokens weight (262, 64)"} <= {*lines}
    assert "3 more: <red>, <green>, <blue>" in ran.out
    assert json.loads(run("show", folder, "--json").out)["whole_weights"]["lm_head"] == {"weight": [262, 64]}
    assert json.loads(run("show", folder, "--json").out)["parameters"] < 2 * 263 * 64 + 4000  # PEFT writes them thrice
