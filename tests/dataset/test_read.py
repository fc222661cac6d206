import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from loradeck.dataset import source
from loradeck.dataset.example import Example, Preference
from loradeck.dataset.read import read_dataset
from loradeck.errors import ConfigError, DataError

PAIR = b'{"prompt": "Hi", "chosen": "Ahoy", "rejected": "Good day"}\n'


def texts(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example] | Sequence[Preference]) -> list[str]:
    return [tokenizer.decode(example.tokens) for example in examples if isinstance(example, Example)]


def test_a_file_is_read_in_order(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "two.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"prompt": "b", "completion": "c"}')
    dataset = read_dataset(path, tiny_tokenizer, 64)
    assert [text[-11:] for text in texts(tiny_tokenizer, dataset.train)] == ["a<|im_end|>", "c<|im_end|>"]
    assert (dataset.name, dataset.form) == (str(path), "text, prompt and completion")
    assert (len(dataset.valid), len(dataset.test), dataset.preferences) == (0, 0, False)
    assert dataset.sha256 == source.find(path).sha256


def test_a_folder_is_read_by_split(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text(msgspec.json.encode({"text": split}).decode())
    dataset = read_dataset(str(tmp_path), tiny_tokenizer, 64)
    read = [texts(tiny_tokenizer, each) for each in (dataset.train, dataset.valid, dataset.test)]
    assert read == [["train<|im_end|>"], ["valid<|im_end|>"], ["test<|im_end|>"]]


def test_preference_pairs(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(PAIR * 2)
    dataset = read_dataset(path, tiny_tokenizer, 64)
    assert dataset.preferences
    assert dataset.form == "preference pairs"
    assert len(dataset.train) == 2
    path.write_bytes(PAIR + b'{"text": "a"}\n' + PAIR)
    with pytest.raises(DataError) as caught:
        read_dataset(path, tiny_tokenizer, 64)
    assert caught.value.problems == ("pairs.jsonl:2: $: text cannot be mixed with preference pairs; make two datasets",)


def test_a_long_text_makes_several_examples(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "Once upon a time"}')
    assert len(read_dataset(path, tiny_tokenizer, 9).train) == 2


def test_every_invalid_line_is_in_one_error(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "train.jsonl").write_bytes(
        b'{"text": "fine"}\n{"text": 1}\n\n{\n{"prompt": "too long for it", "completion": "x"}\n'
    )
    (tmp_path / "valid.jsonl").write_bytes(b'{"messages": [{"role": "robot"}]}')
    (tmp_path / "test.jsonl").write_bytes(b"\n \n")
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path, tiny_tokenizer, 20)
    assert caught.value.message == f"{tmp_path} has 5 problems and cannot be trained on"
    assert caught.value.problems == (
        "train.jsonl:2: $.text: Expected `str`, got `int`",
        "train.jsonl:4: $: Input data was truncated",
        "train.jsonl:5: $: nothing to train on within max_length, 20 tokens; raise it",
        "valid.jsonl:1: $.messages[0].role: unknown role 'robot'; expected one of system, user, assistant, tool",
        "test: is empty",
    )
    assert caught.value.hint


def test_a_truncated_file_does_not_hide_the_other_problems(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "train.json").write_bytes(b'[{"text": "a"}')
    (tmp_path / "valid.jsonl").write_bytes(b"{}")
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path, tiny_tokenizer, 20)
    assert [problem.partition(": ")[0] for problem in caught.value.problems][1:] == ["valid.jsonl:1"]
    assert "train.json is not valid JSON" in caught.value.problems[0]


def test_data_without_a_stop_token_to_train_on_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "data.jsonl"
    end = tiny_tokenizer.eos_token_id
    for labels, said in (
        (
            [-100, 6, -100],
            "train: no example of tokens learns to stop; some must end, within 64 tokens, with <|im_end|>",
        ),
        ([-100, 6, end], ""),
    ):
        path.write_bytes(b'{"text": "a"}\n' + msgspec.json.encode({"tokens": [5, 6, end], "labels": labels}) + b"\n")
        refused = ""
        try:
            read_dataset(path, tiny_tokenizer, 64)
        except DataError as error:
            [refused] = error.problems
        assert refused.startswith(said)
        assert bool(refused) == bool(said)
    path.write_text('{"prompt": "a", "completion": "bcdefghijk"}')
    whole = read_dataset(path, tiny_tokenizer, 64).train[0]
    assert isinstance(whole, Example)
    with pytest.raises(DataError, match="no example of prompt and completion learns to stop"):
        read_dataset(path, tiny_tokenizer, len(whole.tokens) - 1)


def test_a_validation_split_needs_no_stop_token(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    (tmp_path / "valid.jsonl").write_text('{"tokens": [5, 6], "labels": [5, 6]}')
    assert len(read_dataset(tmp_path, tiny_tokenizer, 64).valid) == 1


def test_a_max_length_of_one_is_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match="max_length must be at least 2, not 1"):
        read_dataset(tmp_path / "a.jsonl", tiny_tokenizer, 1)


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def peak(records: int) -> int:
        path = tmp_path / f"{records}.jsonl"
        path.write_bytes(msgspec.json.encode({"text": "a" * 200}) + b"\n")
        path.write_bytes(path.read_bytes() * records)
        tracemalloc.start()
        dataset = read_dataset(path, tiny_tokenizer, 256)
        assert sum(len(example.tokens) for example in dataset.train) == 201 * records
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # what is made once
    assert peak(6000) - peak(2000) < 1_500_000  # buffers; the tokens of 4000 records alone would take 12 MB


keys = st.sampled_from(["text", "prompt", "completion", "messages", "role", "content", "id", "chosen", "rejected"])
values = st.text(max_size=6) | st.none() | st.sampled_from(["user", "assistant", "system"])
turns = st.lists(st.dictionaries(keys, values, max_size=3) | st.fixed_dictionaries({"role": values, "content": values}))
lines = st.dictionaries(keys, values | turns, max_size=3).map(msgspec.json.encode) | st.binary(max_size=20)


@pytest.mark.slow
@given(st.lists(lines, max_size=4).map(b"\n".join), st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_any_file_is_examples_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, content: bytes, kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(content)
    refused, supervised = "", []
    try:
        supervised = [example.supervised for example in read_dataset(path, tiny_tokenizer, 64).train]
    except DataError as error:
        refused = error.hint
    assert refused or all(supervised)
