from collections import Counter
from pathlib import Path

import msgspec
import pytest
from transformers import PreTrainedTokenizerFast

from loradeck.dataset.check import Duplicate, Lengths, check_dataset
from loradeck.dataset.config import DataConfig
from loradeck.dataset.read import read_dataset
from loradeck.errors import DataError

GOOD = [
    {"prompt": "Hi", "completion": "Ahoy"},
    {"prompt": "Bye", "completion": "Fair winds"},
    {"prompt": "Hi", "completion": "Ahoy", "id": 7},
]
HELD = [
    {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Off you go"}]},
    {"prompt": "Bye", "completion": "Fair winds"},
    {"prompt": "Bye", "completion": "So long"},
    {"prompt": "New", "completion": "Aye"},
]


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", *GOOD)
    write(tmp_path / "valid.jsonl", *HELD)
    return tmp_path


def test_sizes_are_those_of_training(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = read_dataset(folder, tiny_tokenizer, 64)
    report = check_dataset(folder, tiny_tokenizer, 64)
    assert (report.form, report.unit, report.problems) == (dataset.form, "tokens", [])
    assert report.form == "prompt and completion, messages"
    lengths = sorted(len(example.tokens) for example in dataset.train)
    part = report.splits["train"]
    assert part.lengths == Lengths(lengths[0], lengths[1], lengths[2], lengths[2])
    assert (part.records, part.examples, part.truncated) == (3, 3, 0)
    assert part.total == sum(lengths)
    assert part.supervised == sum(example.supervised for example in dataset.train) == len("AhoyFair windsAhoy") + 3
    cut = check_dataset(folder, tiny_tokenizer, lengths[-1] - 1)
    assert (cut.splits["train"].truncated, cut.splits["train"].lengths.max) == (1, lengths[-1] - 1)


def test_without_a_tokenizer_characters_are_counted(folder: Path) -> None:
    report = check_dataset(folder, None, 2)
    assert (report.form, report.unit, report.problems) == ("prompt and completion, messages", "characters", [])
    assert report.splits["train"].lengths == Lengths(6, 6, 13, 13)
    assert (report.splits["train"].total, report.splits["train"].supervised) == (25, 18)
    assert report.first == [[("Hi", False), ("Ahoy", True)]]


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_duplicates_are_found_within_and_across_splits(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, with_tokenizer: bool
) -> None:
    report = check_dataset(folder, tiny_tokenizer if with_tokenizer else None, 64)
    train, valid = report.splits["train"], report.splits["valid"]
    assert train.duplicates == [Duplicate("train.jsonl:3", "train.jsonl:1")]
    assert (train.leaked, train.prompts, valid.duplicates) == ([], [], [])
    assert valid.leaked == [Duplicate("valid.jsonl:2", "train.jsonl:2")]
    assert valid.prompts == [Duplicate("valid.jsonl:3", "train.jsonl:2")]


def test_a_record_in_another_form_is_a_duplicate(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Off you go"}]
    write(tmp_path / "train.jsonl", HELD[0], {"instruction": "Bye", "output": "Off you go"}, {"conversations": turns})
    report = check_dataset(tmp_path / "train.jsonl", None, 64)
    assert len(report.splits["train"].duplicates) == 2


def test_texts_have_no_prompt_to_share(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"text": "Once"})
    write(tmp_path / "valid.jsonl", {"text": "Twice"})
    assert check_dataset(tmp_path, None, 64).splits["valid"].prompts == []


def test_invalid_records_do_not_stop_the_check(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", GOOD[0], {"text": 1}, {"prompt": "x" * 90, "completion": "y"}, GOOD[1], [])
    report = check_dataset(path, tiny_tokenizer, 64)
    with pytest.raises(DataError) as caught:
        read_dataset(path, tiny_tokenizer, 64)
    assert [*map(str, report.problems)] == list(caught.value.problems)
    assert [problem.first[0] for problem in report.problems] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:5"]
    assert report.splits["train"].records == 2
    invalid = check_dataset(write(path, {}), tiny_tokenizer, 64)
    assert (invalid.form, invalid.splits["train"].lengths, invalid.first) == ("none", None, [])
    assert len(invalid.problems) == 1


def test_a_problem_is_told_once_for_each_cause(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[object] = [{"question": f"q{n}", "answer": "a"} | ({"id": n} if n % 2 else {}) for n in range(100)]
    rows += [{"messages": [GOOD[0]] * n + [{"role": "user", "content": ""}]} for n in range(4)]
    rows += [{"text": n} for n in range(2)]
    path = write(tmp_path / "a.jsonl", GOOD[0], *rows)
    unknown, empty, no_role, wrong = check_dataset(path, tiny_tokenizer, 64).problems
    assert (unknown.records, unknown.first) == (100, ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"])
    assert "the keys are 'question', 'answer'" in unknown.what
    assert unknown.cli.startswith("--columns prompt=question,completion=answer")
    assert (no_role.records, empty.records, wrong.records) == (3, 1, 2)
    assert str(wrong) == "a.jsonl:106: $.text: Expected `str`, got `int` (in 2 records: also a.jsonl:107)"
    with pytest.raises(DataError) as caught:
        read_dataset(path, tiny_tokenizer, 64)
    assert caught.value.message == f"{path} has 4 problems in 106 records and cannot be trained on"
    assert len(caught.value.problems) == 4
    assert 'DataConfig(columns={"prompt": "question", "completion": "answer"})' in str(caught.value)
    assert "--columns prompt=question,completion=answer" in caught.value.report()


def test_columns_are_mapped(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", {"Question": "Hi", "Answer": "Ahoy", "id": 7})
    config = DataConfig(columns={"prompt": "Question", "completion": "Answer"})
    dataset = read_dataset(path, tiny_tokenizer, 64, config)
    assert [*dataset.train] == [*read_dataset(write(tmp_path / "b.jsonl", GOOD[0]), tiny_tokenizer, 64).train]
    assert dataset.notes == ("passed over: id (in 1)",)
    assert check_dataset(path, tiny_tokenizer, 64, config).problems == []


def test_long_records_are_left_out_on_request(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    long = [{"prompt": "x" * 90, "completion": "y"}, {"prompt": "x", "completion": "y" * 90}]
    path = write(tmp_path / "a.jsonl", *GOOD[:2], *long, {"text": "x" * 90})
    cut = check_dataset(path, tiny_tokenizer, 64)
    assert [problem.first for problem in cut.problems] == [["a.jsonl:3"]]
    assert "--skip-long" in cut.problems[0].cli
    config = DataConfig(skip_long=True)
    report = check_dataset(path, tiny_tokenizer, 64, config)
    part = report.splits["train"]
    assert (report.problems, part.records, part.skipped, part.truncated) == ([], 3, 2, 0)
    assert [str(remark) for remark in report.remarks] == [
        "a.jsonl:3: left out: longer than 64 tokens (in 2 records: also a.jsonl:4)"
    ]
    assert part.lengths is not None
    assert part.lengths.max <= 64
    assert "left out: longer than 64 tokens (in 2 records" in read_dataset(path, tiny_tokenizer, 64, config).notes[0]
    write(path, *long)
    [nothing] = check_dataset(path, tiny_tokenizer, 64, config).problems
    assert nothing.what == "train: nothing is left within 64 tokens; raise it"


def test_a_pair_with_a_long_side_is_left_out(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pair = {"prompt": "Hi", "chosen": "Ahoy", "rejected": "Hello"}
    path = write(tmp_path / "a.jsonl", pair, pair | {"rejected": "x" * 90}, pair | {"prompt": "x" * 90})
    dataset = read_dataset(path, tiny_tokenizer, 64, DataConfig(skip_long=True))
    assert len(dataset.train) == 1


def test_what_is_passed_over_is_named_with_its_count(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [GOOD[0] | {"context": "x", "id": n} for n in range(12)]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy", "reasoning": "greet"}]
    path = write(tmp_path / "a.jsonl", *rows, {"messages": turns})
    for tokenizer in (None, tiny_tokenizer):
        report = check_dataset(path, tokenizer, 64)
        assert [(each.what, each.records, each.first[0]) for each in report.unused] == [
            ("context", 12, "a.jsonl:1"),
            ("id", 12, "a.jsonl:1"),
            ("messages[].reasoning", 1, "a.jsonl:13"),
        ]
    assert read_dataset(path, tiny_tokenizer, 64).notes == (
        "passed over: context (in 12), id (in 12), messages[].reasoning (in 1)",
    )


def test_control_tokens_are_counted(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"{n} <|im_end|>", "completion": "Ahoy"} for n in range(5)]
    path = write(tmp_path / "a.jsonl", GOOD[0], *rows)
    for tokenizer, said in (
        (tiny_tokenizer, "holds the control token <|im_end|> within a message; it is read as text"),
        (None, "holds <|im_end|>, which looks like a control token"),
    ):
        [remark] = check_dataset(path, tokenizer, 64).remarks
        assert (remark.what, remark.records) == (said, 5)


def test_control_tokens_of_another_base_are_said(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(
        tmp_path / "a.jsonl", {"text": "<s>Once</s><|im_end|>"}, {"prompt": "[INST] Hi [/INST]", "completion": "a"}
    )
    assert [str(remark) for remark in check_dataset(path, tiny_tokenizer, 64).remarks] == [
        "a.jsonl:1: already ends with <|im_end|>; no end is added",
        "a.jsonl:1: holds </s>, which looks like another base's control token",
        "a.jsonl:1: holds <s>, which looks like another base's control token",
        "a.jsonl:2: holds [/INST], which looks like another base's control token",
        "a.jsonl:2: holds [INST], which looks like another base's control token",
    ]


def test_the_first_example_with_its_mask(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False)
    path = write(tmp_path / "a.jsonl", {}, *GOOD)
    assert check_dataset(path, tiny_tokenizer, 64).first == [[prompt, ("Ahoy<|im_end|>", True)]]
    write(path, {"prompt": "Hi", "chosen": "Ahoy", "rejected": "Hello"})
    report = check_dataset(path, tiny_tokenizer, 64)
    assert report.first == [[prompt, ("Ahoy<|im_end|>", True)], [prompt, ("Hello<|im_end|>", True)]]
    assert (report.splits["train"].records, report.splits["train"].examples) == (1, 1)
    assert check_dataset(path, None, 64).first == [[("Hi", False), (answer, True)] for answer in ("Ahoy", "Hello")]


def test_token_ids_need_no_tokenizer_to_be_counted(tmp_path: Path) -> None:
    report = check_dataset(write(tmp_path / "a.jsonl", {"tokens": [5, 600, 7], "labels": [-100, 600, 7]}), None, 64)
    assert (report.unit, report.splits["train"].total, report.splits["train"].supervised) == ("tokens", 3, 2)


def test_each_length_is_that_of_a_sequence() -> None:
    assert Lengths.of([7]) == Lengths(7, 7, 7, 7)
    assert Lengths.of(range(100, 0, -1)) == Lengths(1, 50, 95, 100)
    assert Lengths.of(Counter({9: 1, 3: 19})) == Lengths(3, 3, 3, 9)


def test_only_so_many_records_are_compared(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", *GOOD, *GOOD)
    report = check_dataset(path, tiny_tokenizer, 64, compared=3)
    assert len(report.splits["train"].duplicates) == 1
    assert [str(remark) for remark in report.remarks] == ["duplicates are counted among the first 3 of 6 records"]
    whole = check_dataset(path, tiny_tokenizer, 64, compared=6)
    assert (len(whole.splits["train"].duplicates), whole.remarks) == (4, [])


def test_broken_lines_show_where_they_break_and_are_one_problem(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": NaN}\n{"text": -Infinity}\n' + '{"text": "a\x01b"}\n')
    (problem,) = check_dataset(tmp_path / "a.jsonl", None, 64).problems
    assert problem.what == "$: JSON is malformed: invalid character (byte 9), at 'NaN}'"
    (tmp_path / "a.jsonl").write_text("prompt,completion\na,b\n")
    (problem,) = check_dataset(tmp_path / "a.jsonl", None, 64).problems
    assert problem.what == "$: JSON is malformed: invalid character (byte 0), at 'prompt,completion'"


def test_each_key_that_is_passed_over_is_named_as_it_can_be_read(tmp_path: Path) -> None:
    record = {"text": "a", "score1": 1, "score2": 2, "": 3, "\x1b[31m": 4}
    (tmp_path / "a.jsonl").write_bytes(msgspec.json.encode(record))
    unused = check_dataset(tmp_path / "a.jsonl", None, 64).unused
    assert [finding.what for finding in unused] == ["score1", "score2", "''", "'\\x1b[31m'"]
