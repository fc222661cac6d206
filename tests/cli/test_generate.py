import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from tests.own_tokenizers import PLAIN, with_other_ids
from transformers import PreTrainedTokenizerFast

from loradeck.base.fingerprint import fingerprint
from loradeck.base.load import Base
from loradeck.base.weights import CHOICES
from loradeck.cli.options import Weights
from loradeck.cli.prompts import read_prompts
from loradeck.generation import generate
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig


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


def test_an_adapters_own_tokenizer_reads_its_prompts(
    run: Callable, tiny_folder: Path, adapters: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    own = with_other_ids(tiny_tokenizer, chat_template=PLAIN)
    own.save_pretrained(adapters / "poet")
    flags = ["-a", "adapters/poet", "-a", "none", "-a", "adapters/pirate", "--system", "Rhyme.", "--max-new-tokens", 6]
    ran = run("generate", tiny_folder, "One", "Two", "Three", *flags, "--dtype", "float32", "--json")
    assert ran.code == 0, ran.err
    base = Base.load(tiny_folder, dtype="float32")
    bank = Bank(base.model)
    expected = []
    for name, text, tokenizer in (("poet", "One", own), (None, "Two", None), ("pirate", "Three", None)):
        if name:
            bank.load(adapters / name, "x" + name)
        messages = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": text}]
        alone = replace(base, tokenizer=tokenizer or base.tokenizer)
        expected += generate(alone, bank, [messages], "x" + name if name else None, max_new_tokens=6)
    assert [each["answer"] for each in json.loads(ran.out)] == expected


def test_one_answer_is_printed_bare(run: Callable, tiny_folder: Path) -> None:
    ran = run("generate", tiny_folder, "Hello", "--max-new-tokens", 4, "--temperature", 1, "--seed", 3)
    assert ran.code == 0
    assert "[none]" not in ran.out
    assert run("generate", tiny_folder, "Hello", "--max-new-tokens", 4, "--temperature", 1, "--seed", 3).out == ran.out


@pytest.mark.parametrize(
    "order",
    [
        "BASE --adapter adapters/poet one two --max-new-tokens 2 --json",
        "--adapter adapters/poet BASE one --max-new-tokens 2 two --json",
        "--json --max-new-tokens 2 --adapter=adapters/poet BASE one two",
        "BASE one two --json -a adapters/poet --max-new-tokens=2",
    ],
)
def test_options_may_stand_anywhere(run: Callable, tiny_folder: Path, adapters: Path, order: str) -> None:
    ran = run("generate", *order.replace("BASE", str(tiny_folder)).split())
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)
    assert [(row["prompt"], row["adapter"]) for row in rows] == [("one", "adapters/poet"), ("two", "adapters/poet")]


def answers(run: Callable, tiny_folder: Path, *arguments: object, typed: str = "") -> list[str]:
    flags = ["--max-new-tokens", 4, "--dtype", "float32", "--json"]
    ran = run("generate", tiny_folder, *arguments, *flags, typed=typed)
    assert ran.code == 0, ran.err
    return [row["answer"] for row in json.loads(ran.out)]


def test_prompts_come_from_a_file_and_from_a_pipe(run: Callable, tiny_folder: Path, tmp_path: Path) -> None:
    first, second = answers(run, tiny_folder, "One", "Two")
    (tmp_path / "prompts.txt").write_text("\ufeffOne\n\nTwo\r\n", encoding="utf-8")
    assert answers(run, tiny_folder, "--prompts", "prompts.txt") == [first, second]
    assert answers(run, tiny_folder, "Two", "--prompts", "prompts.txt") == [second, first, second]
    assert answers(run, tiny_folder, "--prompts", "-", typed="One\nTwo\n") == [first, second]
    assert answers(run, tiny_folder, typed="One\nTwo\n") == [first, second]
    assert answers(run, tiny_folder, "Two", "-", typed="One") == [second, first]
    assert answers(run, tiny_folder, "Two", typed="not read, as there is a prompt") == [second]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_prompts_are_lines_however_a_file_is_written(tmp_path: Path, encoding: str) -> None:
    """A separator of Unicode does not end a line, as it does not end a record of JSON Lines."""
    for end in ("\n", "\r\n", "\r"):
        text = end.join(["Où?", "", "a\u2028b\x0cc"])
        for name, content in (("a.txt", text.encode(encoding)), ("b.txt", gzip.compress(text.encode(encoding)))):
            (tmp_path / name).write_bytes(content)
            assert read_prompts((), str(tmp_path / name)) == ["Où?", "a\u2028b\x0cc"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress('{"prompt": "a\u2028b"}\n'.encode(encoding)))
    assert read_prompts((), str(tmp_path / "a.jsonl.gz")) == ["a\u2028b"]


def test_prompts_of_a_jsonl_file_are_records(run: Callable, tiny_folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "First"}]
    question = {"role": "user", "content": "And?"}
    records = [{"prompt": "One", "completion": "x"}, {"messages": turns}, {"prompt": [*turns, question]}]
    text = "\n".join(map(json.dumps, records))
    (tmp_path / "prompts.jsonl").write_text(text)
    base = Base.load(tiny_folder, dtype="float32")
    expected = generate(base, None, ["One", turns[:1], [*turns, question]], max_new_tokens=4)
    assert answers(run, tiny_folder, "--prompts", "prompts.jsonl") == expected
    assert answers(run, tiny_folder, typed=text) == expected
    plain = run("generate", tiny_folder, "--prompts", "prompts.jsonl", "--max-new-tokens", 1).out
    assert [line for line in plain.splitlines() if line.startswith("> ")] == [
        "> One  [none]",
        "> One  [none]",
        "> And?  [none]",
    ]


def test_a_system_prompt_precedes_each_conversation_without_one(
    run: Callable, tiny_folder: Path, tmp_path: Path
) -> None:
    def conversation(system: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": "One"}]

    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": conversation("Be long.")}))
    base = Base.load(tiny_folder, dtype="float32")
    expected = generate(base, None, [conversation("Be short."), conversation("Be long.")], max_new_tokens=4)
    assert expected != generate(base, None, ["One", "One"], max_new_tokens=4)
    assert answers(run, tiny_folder, "One", "--system", "Be short.", "--prompts", "own.jsonl") == expected


def test_batches_give_what_one_batch_gives(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    flags = ["-a", "adapters/poet", "-a", "none", "-a", "adapters/pirate", "--seed", 1, "--temperature", 1]
    prompts = ["One", "Two", "Three"]
    assert answers(run, tiny_folder, *prompts, *flags, "--batch-size", 2) == answers(run, tiny_folder, *prompts, *flags)
    one, two = (
        run("generate", tiny_folder, *prompts, "--batch-size", size, "--max-new-tokens", 2).out for size in (1, 9)
    )
    assert one == two


def test_any_base_accepts_an_adapter_of_another_base(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    other = Base.load(tiny_folder, dtype="float32")
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    base = Base(other.model, other.tokenizer, "other", "other", fingerprint(other.model))
    vars(base.model).update(fingerprint=base.fingerprint)
    bank = Bank(base.model)
    bank.add("poet", LoraConfig(r=2))
    bank.save("poet", "elsewhere")
    refused = run("generate", tiny_folder, "Hi", "-a", "elsewhere")
    assert refused.code == 2
    assert "--any-base" in refused.err
    assert "any_base" not in refused.err
    for command in (
        ["generate", tiny_folder, "Hi", "-a", "elsewhere", "--max-new-tokens", 1],
        ["chat", tiny_folder, "-a", "elsewhere"],
        ["merge", tiny_folder, "elsewhere", "-o", "merged"],
    ):
        assert run(*command).code == 2
        ran = run(*command, "--any-base")
        assert ran.code == 0, ran.err


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
        (["--weights", "int3"], "Choose from"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        (["--prompts", "."], ". cannot be read: Is a directory"),
        (["--tempratur", "1"], "Unknown option: --tempratur. Did you mean --temperature"),
        (["x" * 400], "no room in the context"),
    ],
)
def test_invalid_arguments_are_refused(run: Callable, tiny_folder: Path, flags: list[str], message: str) -> None:
    ran = run("generate", tiny_folder, "Hello", *flags)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "a.txt has no prompt"),
        ("a.txt", b"ok\n\xf6", "a.txt:2: byte 0xf6 is not utf-8; as cp1252, the encoding of Windows, it reads 'ö'"),
        ("a.txt", b"ok\xf6", "Save it as UTF-8, uncompressed."),
        ("a.txt.gz", b"\x1f\x8b", "a.txt.gz cannot be decompressed"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "a.jsonl:2: Expected"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}', "a.jsonl:3: the record has no prompt"),
        ("a.jsonl", b"hello", "a.jsonl:1: JSON is malformed"),
        ("a.jsonl", b'{"messages": []}', "a.jsonl:1: the record has no prompt"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "invalid messages"),
    ],
)
def test_an_invalid_file_of_prompts_is_refused(
    run: Callable, tiny_folder: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    ran = run("generate", tiny_folder, "--prompts", name)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_without_a_prompt_the_error_says_how_to_give_one(run: Callable) -> None:
    for typed in ("", " \n"):
        ran = run("generate", "nowhere", typed=typed)
        assert ran.code == 2
        assert ran.err == (
            "loradeck: there is no prompt\nGive one or more, --prompts FILE, or `-` to read them from standard input.\n"
        )


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("adapters/piratte", "Did you mean adapters/pirate?"),
        ("pirate", "Did you mean adapters/pirate?"),
        ("adapters/xyz", "There are: adapters/cut, adapters/pirate, adapters/poet."),
    ],
)
def test_an_unknown_adapter_has_close_names(run: Callable, adapters: Path, given: str, hint: str) -> None:
    for command in (
        ["generate", "nowhere", "Hi", "-a", given],
        ["chat", "nowhere", "-a", f"adapters/poet*0.5+{given}*0.5"],
        ["merge", "nowhere", given, "-o", "merged"],
        ["diff", "adapters/poet", given],
        ["show", given],
        ["publish", given, "adapters/new"],
    ):
        ran = run(*command)  # before the base is looked for
        assert ran.code == 2
        assert ran.err == f"loradeck: {given} is not a folder\n{hint}\n"
