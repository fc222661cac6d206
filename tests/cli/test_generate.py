import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from loradeck.base.load import Base
from loradeck.base.weights import CHOICES
from loradeck.cli.options import Weights
from loradeck.generation import generate
from loradeck.lora.bank import Bank


def test_each_prompt_goes_through_its_own_adapter(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    texts = ["adapters/poet", "none", "adapters/poet*0.5+adapters/pirate*0.5"]
    flags = [flag for text in texts for flag in ("--adapter", text)]
    command = ["generate", tiny_folder, "One", "Two", "Three", *flags, "--max-new-tokens", 6, "--dtype", "float32"]
    ran = run(*command, "--json")
    assert ran.code == 0, ran.err
    base = Base.load(tiny_folder, dtype="float32")
    bank = Bank(base.model)
    for name in ("poet", "pirate"):
        bank.load(adapters / name)
    entries = ["poet", None, {"poet": 0.5, "pirate": 0.5}]
    expected = generate(base, bank, ["One", "Two", "Three"], entries, max_new_tokens=6)
    assert json.loads(ran.out) == [
        {"prompt": prompt, "adapter": text, "answer": answer}
        for prompt, text, answer in zip(["One", "Two", "Three"], texts, expected, strict=True)
    ]
    plain = run(*command).out
    assert "> One  [adapters/poet]\n" in plain
    assert "> Two  [none]\n" in plain


def test_one_answer_is_printed_bare(run: Callable, tiny_folder: Path) -> None:
    ran = run("generate", tiny_folder, "Hello", "--max-new-tokens", 4, "--temperature", 1, "--seed", 3)
    assert ran.code == 0
    assert "[none]" not in ran.out
    assert run("generate", tiny_folder, "Hello", "--max-new-tokens", 4, "--temperature", 1, "--seed", 3).out == ran.out


@pytest.mark.slow
def test_the_flag_selects_the_weights(run: Callable, tiny_folder: Path) -> None:
    answers = {}
    for weights in CHOICES:
        base = Base.load(tiny_folder, dtype="float32", device="cpu", weights=weights)
        (answers[weights],) = generate(base, None, ["Hello"], max_new_tokens=20)
        flags = ["--weights", weights, "--dtype", "float32", "--max-new-tokens", 20, "--json"]
        assert json.loads(run("generate", tiny_folder, "Hello", *flags).out)[0]["answer"] == answers[weights]
    assert answers["int8"] != answers["plain"]  # otherwise the test would not notice a flag that is ignored
    assert get_args(get_args(Weights)[0]) == CHOICES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-a", "none", "-a", "none"], "the numbers of adapters and prompts differ: 2 and 1"),
        (["-a", "nowhere"], "nowhere is not a folder"),
        (["-a", "x*y"], "invalid blend"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--top-p", "0.5"], "--top-p needs a temperature above 0\nAdd --temperature"),
        (["--dtype", "int8"], "Choose from"),
        (["--weights", "int4"], "Choose from"),
    ],
)
def test_invalid_arguments_are_refused(run: Callable, tiny_folder: Path, flags: list[str], message: str) -> None:
    ran = run("generate", tiny_folder, "Hello", *flags)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err
