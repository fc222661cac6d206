"""Accuracy and F1 of classifiers, by hand and by name."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from loradeck import Bank, Base, LoraConfig, evaluate
from loradeck.dataset.read import read_dataset
from loradeck.errors import ConfigError
from loradeck.evaluation.config import EvalConfig
from loradeck.evaluation.labels import label_reports, macro_f1, micro_f1


def test_f1_by_hand() -> None:
    reports = label_reports("a a a b b c O".split(), "a a b b c d O".split())
    assert [(each.label, each.count, each.predicted, each.correct) for each in reports] == [
        ("O", 1, 1, 1), ("a", 3, 2, 2), ("b", 2, 2, 1), ("c", 1, 1, 0), ("d", 0, 1, 0),
    ]  # fmt: skip
    assert [(each.precision, each.recall) for each in reports] == [(1, 1), (1, 2 / 3), (0.5, 0.5), (0, 0), (0, 0)]
    assert macro_f1(reports) == pytest.approx((1 + 0.8 + 0.5) / 5)
    assert micro_f1(reports) == pytest.approx(2 * 3 / (6 + 6))
    assert micro_f1(label_reports("ab", "ba")) is None


@pytest.fixture
def base(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    """A classifier with two labels of its own."""
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, max_position_embeddings=64, id2label={0: "neg", 1: "pos"}, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return Base.load(tmp_path / "base", dtype="float32", device="cpu", task="classify")


def test_labels_are_compared_by_their_names(base: Base, tmp_path: Path) -> None:
    """An adapter that is the base with its labels in another order, and one more, says what the base says."""
    bank = Bank(base.model)
    adapter = bank.add("other", LoraConfig(r=2), num_labels=3)
    adapter.describe(labels=json.dumps(["pos", "more", "neg"]))
    weight = base.model.get_submodule("score").get_parameter("weight")
    with torch.no_grad():
        adapter.saved_module("score")["weight"].copy_(torch.stack([weight[1], weight[0] * 0 - 100, weight[0]]))
        adapter.saved_module("score")["weight"][1] = (weight[0] + weight[1]) / 2  # never the largest
    records = [{"text": f"{n}", "label": "pos" if n % 3 else "neg"} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = read_dataset(tmp_path / "data.jsonl", base.tokenizer, 32, task="classify")
    mine, other = evaluate(base, bank, data.train, ["other"], labels=data.labels).adapters
    assert (mine.adapter, other.adapter) == ("none", "other")
    assert mine.labels == other.labels
    assert mine.accuracy == other.accuracy
    assert other.loss > mine.loss  # one more label takes its share
    with torch.no_grad():
        predictions = [
            ("neg", "pos")[int(base.model(input_ids=torch.tensor([example.tokens])).logits.argmax())]
            for example in data.train
        ]
    right = sum(one == each["label"] for one, each in zip(predictions, records, strict=True))
    assert mine.accuracy == pytest.approx(right / 12)
    adapter.describe(labels=json.dumps(["good", "more", "bad"]))
    with pytest.raises(ConfigError, match="'other' does not have the labels 'neg', 'pos' of the dataset"):
        evaluate(base, bank, data.train, ["other"], labels=data.labels)
    with pytest.raises(ConfigError, match="the names of the labels are missing"):
        evaluate(base, bank, data.train, ["other"])
    with pytest.raises(ConfigError, match="exact_match and pattern are about answers"):
        evaluate(base, bank, data.train, ["other"], EvalConfig(exact_match=True), labels=data.labels)
