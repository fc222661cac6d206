"""embed and classify: each text through its own adapter, as PEFT computes it alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.classifiers import FAMILIES, make, wrapped
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loradeck import Bank, Base
from loradeck.errors import BaseModelError, ConfigError, LogitsError, RouteError
from loradeck.pooling import classify, embed

# PEFT asks for an attribute of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TEXTS = ["a", "some longer text", "ab", "the longest of all these texts"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def base_of(family: str, task: Any, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Base:
    make(family, task, 2, 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Base.load(folder, dtype="float32", device="cpu", task=task)


def alone(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, text: str) -> Any:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))


def check_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("task", ["classify", "tokens"])
def test_texts_are_classified_as_by_peft_alone(
    family: str, task: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = base_of(family, task, tmp_path / "base", tiny_tokenizer)
    bank = Bank(base.model)
    probabilities = []
    for text, labels in zip(TEXTS, (3, 5, 4, 2), strict=True):
        if labels == 2:
            model: torch.nn.Module = make(family, task, 2, 1)
        else:
            model = peft_model = wrapped(family, task, labels, labels)
            peft_model.save_pretrained(str(tmp_path / f"a{labels}"))
            bank.load(tmp_path / f"a{labels}")
        probabilities.append(alone(model, tiny_tokenizer, text).logits[0].softmax(-1))
    for ours, theirs in zip(classify(base, bank, TEXTS, ["a3", "a5", "a4", None]), probabilities, strict=True):
        check_close(ours, theirs)
    check_close(classify(base, bank, [*TEXTS[:1]], "a3")[0], probabilities[0])


def test_texts_are_embedded_as_by_peft_alone(
    family: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = base_of(family, "embed", tmp_path / "base", tiny_tokenizer)
    bank = Bank(base.model)
    models: dict[str | None, torch.nn.Module] = {None: make(family, "embed", 2, 1)}
    for seed, name in enumerate(("one", "two", "three")):
        model = wrapped(family, "embed", 2, seed)
        model.save_pretrained(str(tmp_path / name))
        bank.load(tmp_path / name)
        models[name] = model
    names = ["one", "two", None, "three"]
    vectors = embed(base, bank, TEXTS, names)
    for vector, name, text in zip(vectors, names, TEXTS, strict=True):
        states = alone(models[name], tiny_tokenizer, text).last_hidden_state[0]
        check_close(vector, states[-1] if family in ("llama", "qwen2") else states.mean(0))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("mode", "normalize"), [("cls", True), ("lasttoken", False), ("max", False), ("mean", True)])
def test_pooling_is_as_the_sentence_transformers_files_say(
    mode: str, normalize: bool, old: bool, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base_of("bert", "embed", tmp_path, tiny_tokenizer)
    write_modules(tmp_path, mode, normalize=normalize, old=old)
    base = Base.load(tmp_path, dtype="float32", device="cpu", task="embed")
    for vector, text in zip(embed(base, None, TEXTS), TEXTS, strict=True):
        states = alone(make("bert", "embed", 2, 1), tiny_tokenizer, text).last_hidden_state[0]
        pooled = {"cls": states[0], "lasttoken": states[-1], "max": states.amax(0), "mean": states.mean(0)}[mode]
        check_close(vector, pooled / pooled.norm() if normalize else pooled)


def write_modules(folder: Path, mode: str, *, normalize: bool = False, old: bool = True, extra: str = "") -> None:
    flags = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "weightedmean": "weightedmean_tokens"}
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else []), *([extra] if extra else [])]
    modules = [
        {"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    settings: dict[str, Any] = {"pooling_mode": mode}
    if old:
        settings = {f"pooling_mode_{name}": name == flags.get(mode, mode) for name in [*flags.values(), "lasttoken"]}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("mode", "extra", "message"),
    [
        ("weightedmean", "", "the pooling weightedmean in 1_Pooling/config.json"),
        ("mean", "Dense", "a module 'Dense' in modules.json"),
    ],
)
def test_what_is_not_supported_is_named(
    mode: str, extra: str, message: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base_of("bert", "embed", tmp_path, tiny_tokenizer)
    write_modules(tmp_path, mode, extra=extra)
    with pytest.raises(BaseModelError, match=message):
        Base.load(tmp_path, dtype="float32", device="cpu", task="embed")
    (tmp_path / "modules.json").write_text("{", encoding="utf-8")
    with pytest.raises(BaseModelError, match=r"modules.json cannot be read"):
        Base.load(tmp_path, dtype="float32", device="cpu", task="embed")


def test_robertas_context_leaves_room_for_its_first_positions(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = base_of("roberta", "embed", tmp_path, tiny_tokenizer)
    assert base.context == 63  # of 64 positions, after that of padding
    assert embed(base, None, ["a" * 63]).isfinite().all()
    with pytest.raises(ConfigError, match=r"a text of 64 tokens; .* takes 63"):
        embed(base, None, ["a" * 64])


def test_one_label_and_several_at_once(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    base = base_of("bert", "classify", tmp_path, tiny_tokenizer)
    (logits,) = (alone(base.model, tiny_tokenizer, "a").logits,)
    base.model.config.problem_type = "multi_label_classification"
    check_close(classify(base, None, ["a"])[0], logits[0].sigmoid())
    base.model.config.problem_type = "regression"
    check_close(classify(base, None, ["a"])[0], logits[0])


def test_wrong_arguments(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, base: Base) -> None:
    classifier = base_of("bert", "classify", tmp_path, tiny_tokenizer)
    with pytest.raises(
        ConfigError, match=r"loaded for the task classify, and this needs embed\nLoad it with Base.load"
    ):
        embed(classifier, None, ["a"])
    with pytest.raises(ConfigError, match="loaded for the task generate, and this needs classify or tokens"):
        classify(base, None, ["a"])
    for texts, message in (("a", "not a list"), ([], "not a list"), ([""], "a text is empty"), ([[999]], "id 999")):
        with pytest.raises(ConfigError, match=message):
            classify(classifier, None, texts)
    with pytest.raises(RouteError, match="2 and 1"):
        classify(classifier, Bank(classifier.model), ["a"], [None, None])
    with pytest.raises(RouteError, match="no bank"):
        classify(classifier, None, ["a"], "poet")
    with torch.no_grad():
        classifier.model.classifier.weight.fill_(torch.nan)
    with pytest.raises(LogitsError, match="NaN"):
        classify(classifier, None, ["a"])
