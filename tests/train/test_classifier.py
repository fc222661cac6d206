"""Classifiers, taggers and reward models: what they learn, the laws of training, and the same logits in PEFT."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from loradeck import Bank, Base, LoraConfig
from loradeck.dataset.example import Example, Preference
from loradeck.dataset.label import forms_of
from loradeck.dataset.labelled_example import LabelledExample, encode_pair
from loradeck.dataset.read import Dataset, read_dataset
from loradeck.dataset.record import PreferencePair, parse
from loradeck.errors import ConfigError
from loradeck.evaluation.evaluator import evaluate
from loradeck.train import checkpoint
from loradeck.train.config import TrainConfig
from loradeck.train.trainer import Trainer, train

# PEFT asks for an attribute of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
WORDS = "[PAD] [UNK] [CLS] [SEP] the a was is film book good great bad awful in Rome Paris Anna Otto and".split()
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: Mapping[str, Callable[[], PretrainedConfig]] = {
    "bert": lambda: BertConfig(**SIZES),
    "roberta": lambda: RobertaConfig(**SIZES, type_vocab_size=1),
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "deberta": lambda: DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8
    ),
}
CLASSES = {"tokens": AutoModelForTokenClassification}
LABELS = {"good": "pos", "great": "pos", "bad": "neg", "awful": "neg"}
TAGS = {"Rome": "PLACE", "Paris": "PLACE", "Anna": "PERSON", "Otto": "PERSON"}
REVIEWS = [
    {"text": f"{article} {thing} {verb} {word}", "label": label}
    for article in ("the", "a") for thing in ("film", "book") for verb in ("was", "is") for word, label in LABELS.items()
]  # fmt: skip
PLACES = [
    {"tokens": [who, verb, "in", where], "tags": [TAGS[who], "O", "O", TAGS[where]]}
    for who in ("Anna", "Otto") for verb in ("was", "is") for where in ("Rome", "Paris")
]  # fmt: skip
PAIRS = [
    {"prompt": f"{article} {thing}", "chosen": f"was {good}", "rejected": f"was {bad}"}
    for article in ("the", "a") for thing in ("film", "book") for good in ("good", "great") for bad in ("bad", "awful")
]  # fmt: skip
RECORDS: Mapping[str, Sequence[Mapping[str, Any]]] = {"classify": REVIEWS, "tokens": PLACES, "reward": PAIRS}
CONFIG = TrainConfig(learning_rate=1e-2, max_steps=60, batch_size=4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words, with [CLS] before a text and [SEP] after each, as BERT's."""
    definition = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    definition.pre_tokenizer = pre_tokenizers.Whitespace()
    definition.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=definition, model_input_names=inputs, **names)


def whole(family: str, task: str, outputs: int) -> PreTrainedModel:
    """A model with a head; its body is the same for every number of outputs."""
    config = FAMILIES[family]()
    config.num_labels = outputs
    torch.manual_seed(0)
    return CLASSES.get(task, AutoModelForSequenceClassification).from_config(config, dtype=torch.float32).eval()


def base_of(family: str, task: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Base:
    """A base whose files have no head."""
    model = whole(family, task, 2)
    getattr(model, model.base_model_prefix).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return Base.load(folder / "base", dtype="float32", device="cpu", task=task)


def write(folder: Path, records: Sequence[Mapping[str, Any]], name: str = "data.jsonl") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read(base: Base, folder: Path, records: Sequence[Mapping[str, Any]]) -> Dataset:
    return read_dataset(write(folder, records), base.tokenizer, 32, task=base.task)


def inputs(base: Base, example: Example) -> dict[str, torch.Tensor]:
    """One row of a model, with the token types of BERT."""
    found = {"input_ids": torch.tensor([example.tokens])}
    if base.model.config.model_type == "bert" and isinstance(example, LabelledExample) and example.second:
        found["token_type_ids"] = torch.tensor([[int(at >= example.second) for at in range(len(example.tokens))]])
    return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=RECORDS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(family: str, task: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Base:
    return base_of(family, task, tmp_path, tokenizer)


@pytest.fixture
def bert(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Base:
    return base_of("bert", "classify", tmp_path, tokenizer)


def test_it_learns_and_peft_gives_the_same(family: str, task: str, base: Base, tmp_path: Path) -> None:
    data = read(base, tmp_path, RECORDS[task])
    outputs = len(data.labels) or 1
    bank = Bank(base.model)
    bank.add("new", LoraConfig(r=4), num_labels=outputs, generator=torch.Generator().manual_seed(0))
    bank["new"].describe(labels=json.dumps(data.labels))
    result = train(base, bank, "new", data.train, CONFIG)
    assert result.losses[-1] < result.losses[0] / 5
    report = evaluate(base, bank, data.train, ["new"], labels=data.labels)
    (row,) = report.adapters  # the base has no head
    assert row.accuracy == 1
    if task != "reward":
        assert row.f1 == 1
    rows = [side for example in data.train[:6] for side in example.sequences]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(each.tokens) for each in rows], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad(), bank.route("new"):
        ours = base.model(**batch).logits
    bank.save("new", tmp_path / "new")
    theirs = peft.PeftModel.from_pretrained(whole(family, task, outputs), str(tmp_path / "new")).eval()
    assert type(theirs).__name__ == f"PeftModelFor{'Token' if task == 'tokens' else 'Sequence'}Classification"
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(**batch).logits, rtol=1e-5, atol=1e-5)


def test_the_losses_are_their_definitions(family: str, task: str, base: Base, tmp_path: Path) -> None:
    data = read(base, tmp_path, RECORDS[task])
    bank = Bank(base.model)
    bank.add("new", LoraConfig(r=4), num_labels=len(data.labels) or 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in bank.parameters("new"):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(base, bank)
    job = trainer.add("new", data.train, CONFIG, valid=data.train)
    trainer.evaluate([job])
    total, right, count = 0.0, 0, 0
    for example in data.train:
        with torch.no_grad(), bank.route("new"):
            logits = [base.model(**inputs(base, side)).logits[0] for side in example.sequences]
        if task == "reward":
            margin = logits[0][0] - logits[1][0]
            total, right, count = total - float(logsigmoid(margin)), right + int(margin > 0), count + 1
        else:
            (side,) = example.sequences
            rows = logits[0] if task == "tokens" else logits[0].expand(len(side.tokens), -1)
            labels = torch.tensor(side.labels)
            total += float(cross_entropy(rows, labels, reduction="sum"))
            right += int((rows.argmax(-1) == labels).sum())
            count += int((labels != -100).sum())
    assert job.progress.validation[0] == pytest.approx(total / count, rel=1e-5)
    bank["new"].describe(labels=json.dumps(data.labels))
    (row,) = evaluate(base, bank, data.train, ["new"], labels=data.labels).adapters
    assert row.loss == pytest.approx(total / count, rel=1e-5)
    assert row.accuracy == pytest.approx(right / count)


# ---- the laws of training


def jobs(base: Base, folder: Path) -> dict[str, tuple[Dataset, LoraConfig, TrainConfig]]:
    """Classifiers with 2, 3 and 4 labels, which differ in everything."""
    three = [{"text": f"the {word} was in Rome", "label": word} for word in ("film", "book", "Anna")]
    four = [
        {"text": f"{word} is good and bad", "label": str(at)} for at, word in enumerate(("film", "book", "a", "the"))
    ]
    settings = {"dropout": LoraConfig(r=4, lora_dropout=0.3), "few": LoraConfig(r=2, target_modules="attention")}
    return {
        "two": (read(base, folder / "2", REVIEWS), settings["dropout"], TrainConfig(learning_rate=1e-2, max_steps=6)),
        "three": (read(base, folder / "3", three), settings["few"], TrainConfig(learning_rate=3e-3, max_steps=9, batch_size=2)),
        "four": (read(base, folder / "4", four), LoraConfig(), TrainConfig(learning_rate=1e-3, max_steps=4, weight_decay=0.1)),
    }  # fmt: skip


def outcomes(
    base: Base, specs: Mapping[str, tuple[Dataset, LoraConfig, TrainConfig]], each_pass: Callable[[Trainer], None] | None = None
) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:  # fmt: skip
    bank = Bank(base.model)
    trainer = Trainer(base, bank, max_tokens=20)
    for name, (data, lora, config) in specs.items():
        bank.add(name, lora, num_labels=len(data.labels), generator=torch.Generator().manual_seed(5))
        trainer.add(name, data.train, config, valid=data.train)
    for _ in trainer:
        if each_pass:
            each_pass(trainer)
    found = {
        name: (job.progress.losses, {key: tensor.detach().clone() for key, tensor in job.adapter.tensors()})
        for name, job in trainer.jobs.items()
    }
    bank.detach()
    return found


def test_together_is_alone(bert: Base, tmp_path: Path) -> None:
    specs = jobs(bert, tmp_path)
    weights = {name: value.clone() for name, value in bert.model.state_dict().items()}
    together = outcomes(bert, specs)
    for name, spec in specs.items():
        losses, tensors = outcomes(bert, {name: spec})[name]
        assert together[name][0] == losses
        assert tensors.keys() == together[name][1].keys()
        assert any("classifier" in key for key in tensors)
        assert all(torch.equal(tensor, together[name][1][key]) for key, tensor in tensors.items())
    for name, value in bert.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_one_that_is_nan_fails_alone(bert: Base, tmp_path: Path) -> None:
    specs = jobs(bert, tmp_path)

    def poison(trainer: Trainer) -> None:
        if trainer.passes == 1:
            for parameter in trainer.bank["two"].saved_module("classifier").values():
                parameter.data.fill_(torch.nan)

    together = outcomes(bert, specs, poison)
    assert len(together["two"][0]) == 1
    for name in ("three", "four"):
        assert together[name][0] == outcomes(bert, {name: specs[name]})[name][0]


def test_a_resumed_run_has_the_same_bits(bert: Base, tmp_path: Path) -> None:
    specs = jobs(bert, tmp_path)
    hashes = {name: data.sha256 for name, (data, _, _) in specs.items()}

    def save(trainer: Trainer) -> None:
        if trainer.passes + 1 == 3:
            trainer.passes += 1
            checkpoint.save(trainer, tmp_path / "checkpoints", data=hashes, parents={}, files={}, keep=1)
            trainer.passes -= 1

    through = outcomes(bert, specs, save)
    bank = Bank(bert.model)
    trainer = Trainer(bert, bank, max_tokens=20)
    for name, (data, lora, config) in specs.items():
        bank.add(name, lora, num_labels=len(data.labels), generator=torch.Generator().manual_seed(8))
        trainer.add(name, data.train, config, valid=data.train)
    (path,) = checkpoint.checkpoints(tmp_path / "checkpoints")
    checkpoint.restore(trainer, path, checkpoint.read(path), data=hashes, parents={})
    for _ in trainer:
        pass
    for name, job in trainer.jobs.items():
        assert job.progress.losses == through[name][0]
        assert all(torch.equal(tensor, through[name][1][key]) for key, tensor in job.adapter.tensors())


# ---- what does not fit


def test_examples_of_another_task_are_refused(bert: Base, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bank = Bank(bert.model)
    bank.add("new", LoraConfig(), num_labels=2)
    pairs = read_dataset(write(tmp_path, PAIRS), tokenizer, 32, task="reward").train
    with pytest.raises(ConfigError, match="loaded for the task classify, and the examples are for another one"):
        train(bert, bank, "new", pairs, CONFIG)
    four = read(bert, tmp_path, [{"text": word, "label": word} for word in ("film", "book", "the", "a")])
    with pytest.raises(ConfigError, match="label 3 is beyond the head, which has 2 outputs"):
        train(bert, bank, "new", four.train, CONFIG)


def test_a_pair_has_two_segments(bert: Base, tmp_path: Path) -> None:
    """The order of two texts is told by their token types alone, once positions say nothing."""
    records = [{"premise": one, "hypothesis": other, "label": one} for one, other in (("good", "bad"), ("bad", "good"))]
    data = read(bert, tmp_path, records)
    assert [example.second for example in data.train] == [3, 3]
    bert.model.bert.embeddings.position_embeddings.weight.zero_()
    bank = Bank(bert.model)
    bank.add("new", LoraConfig(r=4), num_labels=2, generator=torch.Generator().manual_seed(0))
    assert train(bert, bank, "new", data.train, CONFIG).losses[-1] < 0.1


def test_the_context_of_roberta_is_that_of_its_positions(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    base = base_of("roberta", "classify", tmp_path, tokenizer)
    assert base.context == 39
    ids = torch.full((1, 39), 5)
    base.model(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        base.model(input_ids=torch.full((1, 40), 5))


def test_the_example_of_the_page_runs(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    whole("bert", "classify", 2).bert.save_pretrained("bert-base-uncased")
    tokenizer.save_pretrained("bert-base-uncased")
    write(tmp_path, REVIEWS, "reviews.jsonl")
    page = Path(__file__).parents[2] / "docs" / "training.md"
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if "mood" in block)
    exec(compile(example, page, "exec"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_answers_for_a_chat_template_are_encoded_as_for_dpo(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pair = parse(json.dumps(PAIRS[0]).encode(), {}, forms_of("reward"))
    assert isinstance(pair, PreferencePair)
    assert encode_pair(pair, tiny_tokenizer, 64) == Preference.of(pair, tiny_tokenizer, 64)
