import json
from importlib.resources import files

import pytest
from transformers import PreTrainedTokenizerFast

from loradeck.dataset.read import read_dataset
from loradeck.dataset.record import Completion, parse

DEMO = files("loradeck.demo")


def pairs(name: str) -> dict[str, str]:
    records = [parse(line.encode()) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]
    assert all(isinstance(record, Completion) for record in records)
    return {record.prompt: record.completion for record in records if isinstance(record, Completion)}


@pytest.mark.parametrize("name", ["pirate.jsonl", "json.jsonl"])
def test_the_datasets_can_be_read(tiny_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    assert len(read_dataset(str(DEMO / name), tiny_tokenizer, 256).train) == len(pairs(name)) >= 60


def test_both_answer_the_same_questions_and_none_of_those_held_out() -> None:
    pirate, strict = pairs("pirate.jsonl"), pairs("json.jsonl")
    assert pirate.keys() == strict.keys()
    held_out = json.loads((DEMO / "prompts.json").read_text(encoding="utf-8"))
    assert len(held_out) >= 6
    assert not pirate.keys() & set(held_out)


def test_the_two_differ_in_style() -> None:
    for answer in pairs("json.jsonl").values():
        assert "\n" not in answer
        assert json.loads(answer).keys() == {"answer", "confidence"}
        assert json.loads(answer)["confidence"] in ("high", "medium", "low")
    words = ("arrr", "ahoy", "matey", "hearty", "avast", "yarr", "aye")
    assert all(any(word in answer.lower() for word in words) for answer in pairs("pirate.jsonl").values())
