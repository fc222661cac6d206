from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from loradeck.cli.blend import load, parse, read
from loradeck.errors import ConfigError
from loradeck.lora.bank import Bank


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("none", {}),
        ("a/poet", {"a/poet": 1.0}),
        ("poet*0.7+pirate*0.3", {"poet": 0.7, "pirate": 0.3}),
        ("poet*-1 + pirate", {"poet": -1.0, "pirate": 1.0}),
        ("poet*0.5+poet*0.25", {"poet": 0.75}),
    ],
)
def test_parse(text: str, weights: dict[str, float]) -> None:
    assert parse(text) == weights


@pytest.mark.parametrize("text", ["", "+", "poet*", "*0.5", "poet*half", "poet+", "poet*0.5*"])
def test_an_invalid_blend_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid blend"):
        parse(text)


@given(st.text())
def test_any_text_is_a_blend_or_an_error(text: str) -> None:
    try:
        weights = parse(text)
    except ConfigError:
        return
    assert weights or text == "none"


def test_a_folder_with_any_name_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a*2+b").mkdir()
    assert parse("a*2+b") == {"a*2+b": 1.0}


def test_each_folder_is_loaded_once_and_like_names_do_not_clash(adapters: Path, tiny: LlamaForCausalLM) -> None:
    (adapters / "pirate").rename(adapters.parent / "poet")
    bank = Bank(tiny)
    first, second = str(adapters / "poet"), str(adapters.parent / "poet")
    texts = [first, "none", f"{first}*0.5+{second}*0.5", f"{second}*0.5+{adapters}/../poet*0.25"]
    entries = load(bank, texts, read(texts))
    assert entries == [{"poet": 1.0}, None, {"poet": 0.5, "poet-2": 0.5}, {"poet-2": 0.75}]
    assert bank.names() == ["poet", "poet-2"]


def test_versions_are_named_after_their_adapter(adapters: Path, tiny: LlamaForCausalLM) -> None:
    for version, name in enumerate(("poet", "pirate"), start=1):
        (adapters / name).rename(adapters / f"poet@{version}")
    bank = Bank(tiny)
    first, second = str(adapters / "poet@1"), str(adapters / "poet@2")
    texts = [first, f"{second}*0.5+{first}"]
    assert load(bank, texts, read(texts)) == [{"poet": 1.0}, {"poet-2": 0.5, "poet": 1.0}]
