"""Records with labels: their usual names, the numbers of the labels, and what is wrong with them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loradeck.dataset.check import check_dataset
from loradeck.dataset.config import DataConfig
from loradeck.dataset.label import forms_of
from loradeck.dataset.labelled_example import LabelledExample
from loradeck.dataset.read import read_dataset
from loradeck.dataset.record import LabelledText, TaggedWords, parse
from loradeck.errors import ConfigError, DataError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(records: Sequence[Mapping[str, Any]], name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    return write


@pytest.mark.parametrize(
    ("keys", "texts", "label", "unused"),
    [
        ({"text": "a", "label": "x"}, ("a",), "x", ()),
        ({"sentence": "a", "label": 1, "idx": 3}, ("a",), "1", ("idx",)),
        ({"review": "a", "sentiment": " good "}, ("a",), "good", ()),
        ({"text": "a", "text_pair": "b", "label": True}, ("a", "b"), "true", ()),
        ({"text_a": "a", "text_b": "b", "labels": False}, ("a", "b"), "false", ()),
        ({"sentence1": "a", "sentence2": "b", "category": 0}, ("a", "b"), "0", ()),
        ({"premise": "a", "hypothesis": "b", "class": "x"}, ("a", "b"), "x", ()),
        ({"text": "a", "premise": "c", "hypothesis": "b", "label": 2.0}, ("a",), "2", ("premise", "hypothesis")),
        ({"text": "a", "label": "x", "category": "y"}, ("a",), "x", ("category",)),
    ],
)
def test_texts_under_their_usual_names(keys: dict, texts: tuple, label: str, unused: tuple) -> None:
    record = parse(json.dumps(keys).encode(), {}, forms_of("classify"))
    assert record == LabelledText(texts, label)
    assert record.unused == unused


def test_columns_that_are_named_count_first() -> None:
    keys = {"sentence1": "a", "sentence2": "b", "body": "c", "label": "x", "kind": "y"}
    record = parse(json.dumps(keys).encode(), {"text": "body", "label": "kind"}, forms_of("classify"))
    assert record == LabelledText(("c",), "y")
    assert DataConfig(columns="text_pair=other,tags=pos").source_columns == {"text_pair": "other", "tags": "pos"}


@pytest.mark.parametrize("names", [("tokens", "tags"), ("tokens", "ner_tags"), ("words", "labels")])
def test_words_under_their_usual_names(names: tuple[str, str]) -> None:
    keys = dict(zip(names, (["Anna", "was", "here"], ["B-PER", -100, 0]), strict=True))
    record = parse(json.dumps(keys).encode(), {}, forms_of("tokens"))
    assert record == TaggedWords(["Anna", "was", "here"], ["B-PER", None, "0"])


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        ("classify", {"text": " ", "label": "x"}, r"\$.text: is empty"),
        ("classify", {"text": "a", "label": ""}, r"\$.label: is empty"),
        ("classify", {"text": "a", "label": 0.5}, r"\$.label: is the number 0.5; .* regression is not supported"),
        ("classify", {"text": "a", "label": ["x"]}, r"\$.label: is a list; several labels"),
        ("classify", {"text": "a", "label": {}}, r"\$.label: must be a text or an integer"),
        ("classify", {"text": "a"}, r"\$: unknown form; expected text and label, but the keys are 'text'"),
        ("tokens", {"tokens": ["a", "b"], "tags": ["x"]}, r"\$.tags: has 1 items, but tokens has 2"),
        ("tokens", {"tokens": ["a", ""], "tags": ["x", "y"]}, r"\$.tokens\[1\]: is empty"),
        ("tokens", {"tokens": ["a"], "tags": [None]}, r"\$.tags: nothing to learn"),
        ("reward", {"prompt": "a", "completion": "b"}, r"\$: unknown form; expected chosen and rejected"),
    ],
)
def test_what_cannot_be_learned_is_named(task: str, keys: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(json.dumps(keys).encode(), {}, forms_of(task))


def test_labels_are_sorted_and_numbered_alike_in_all_splits(
    write: Write, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write([{"text": "a", "label": 10}, {"text": "b", "label": 9}, {"text": "c", "label": 9}], "d/train.jsonl")
    write([{"text": "e", "label": 9}, {"text": "f", "label": 10}], "d/valid.jsonl")
    data = read_dataset(tmp_path / "d", tiny_tokenizer, 64, task="classify")
    assert data.labels == ("9", "10")
    assert [example.labels[-1] for example in data.train] == [1, 0, 0]
    assert [example.labels[-1] for example in data.valid] == [0, 1]
    assert data.label_counts == {"train": {"9": 2, "10": 1}, "valid": {"9": 1, "10": 1}}
    known = read_dataset(tmp_path / "d", tiny_tokenizer, 64, task="classify", labels=("10", "8", "9"))
    assert [example.labels[-1] for example in known.train] == [0, 2, 2]


def test_a_label_that_training_has_not_is_named_with_its_line(
    write: Write, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "d/train.jsonl")
    write([{"text": "a", "label": "x"}, {"text": "b", "label": "z"}], "d/valid.jsonl")
    message = r"valid.jsonl:2: \$.label: 'z' is not one of the labels that training has: 'x', 'y'"
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "d", tiny_tokenizer, 64, task="classify")


@pytest.mark.parametrize(
    ("labels", "message", "hint"),
    [
        (["x"] * 3, "train: every label is 'x', so there is nothing to learn", "Each record has text and label."),
        ([f"{n}" for n in range(30)], "train: label has 30 different values in 30 examples", "--columns label=COLUMN"),
    ],
)
def test_labels_that_make_no_sense(
    write: Write, tiny_tokenizer: PreTrainedTokenizerFast, labels: list[str], message: str, hint: str
) -> None:
    file = write([{"text": "a", "label": label} for label in labels])
    with pytest.raises(DataError, match=message) as error:
        read_dataset(file, tiny_tokenizer, 64, task="classify")
    assert hint in error.value.text("cli")


@pytest.mark.parametrize(
    ("keys", "task", "hint"),
    [
        ({"sentence": "a", "label": "x"}, "generate", "Give --task classify."),
        ({"words": ["a"], "tags": ["x"]}, "generate", "Give --task tokens."),
        ({"text": "a", "label": "x"}, "tokens", "Give --task classify."),
        ({"prompt": "a", "completion": "x"}, "classify", "Leave out --task."),
    ],
)
def test_records_of_another_task_say_so(
    write: Write, tiny_tokenizer: PreTrainedTokenizerFast, keys: dict, task: str, hint: str
) -> None:
    with pytest.raises(DataError) as error:
        read_dataset(write([keys]), tiny_tokenizer, 64, task=task)
    assert hint in error.value.text("cli")


def test_a_text_with_a_label_for_a_language_model_is_remarked_upon(
    write: Write, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (note, remark) = read_dataset(write([{"text": "a", "label": "x"}]), tiny_tokenizer, 64).notes
    assert note.startswith("passed over: label")
    assert "the task classify does" in remark


def test_an_unknown_task(write: Write, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="nothing to learn for task 'embed'"):
        read_dataset(write([{"text": "a"}]), tiny_tokenizer, 64, task="embed")


def test_the_label_is_at_the_last_token_that_is_left(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = LabelledExample.of_text(["abc"], 7, tiny_tokenizer, 64)
    assert (whole.labels, whole.supervised, whole.truncated) == ([-100, -100, 7], 1, False)
    cut = LabelledExample.of_text(["abc"], 7, tiny_tokenizer, 2)
    assert (cut.tokens, cut.labels, cut.truncated) == (whole.tokens[:2], [-100, 7], True)


def test_the_first_token_of_a_word_is_labelled(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    words, labels = ["ab", "é", "c"], [0, None, 2]
    example = LabelledExample.of_words(words, labels, tiny_tokenizer, 64)
    assert example.tokens == tiny_tokenizer("ab é c")["input_ids"]
    assert example.labels == [0, -100, -100, -100, -100, -100, 2]
    cut = LabelledExample.of_words(words, labels, tiny_tokenizer, 4)
    assert (cut.labels, cut.truncated) == ([0, -100, -100, -100], True)
    with pytest.raises(DataError, match="no tag within max_length"):
        LabelledExample.of_words(words, [None, None, 2], tiny_tokenizer, 4)


def test_a_word_that_begins_with_a_space_in_its_token(spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    example = LabelledExample.of_words(["a", "b"], [1, 0], spaced_tokenizer, 64)
    names = spaced_tokenizer.convert_ids_to_tokens(example.tokens)
    assert dict(zip(names, example.labels, strict=True)) | {"<s>": -100} == {"<s>": -100, "▁a": 1, "▁b": 0}


def test_check_counts_the_labels(write: Write) -> None:
    report = check_dataset(
        write([{"text": "a", "label": "y"}, {"text": "b", "label": "x"}, {"text": "c", "label": "y"}]),
        None, 64, task="classify",
    )  # fmt: skip
    assert report.splits["train"].labels == {"x": 1, "y": 2}
    assert [span.text for span in report.first[0]] == ["a", "y"]
    assert not report.problems


def test_a_table(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,1\n")
    assert read_dataset(tmp_path / "a.csv", tiny_tokenizer, 64, task="classify").labels == ("0", "1")
    (tmp_path / "b.tsv").write_text('tokens\ttags\n"[""a"", ""b""]"\t"[""x"", ""y""]"\n')
    (example,) = read_dataset(tmp_path / "b.tsv", tiny_tokenizer, 64, task="tokens").train
    assert example.labels == [0, -100, 1]
