"""Regexes of files: what PEFT's own matching gives, within a bound of time."""

import re

import pytest
from peft.utils.other import get_pattern_key

from loradeck.errors import ConfigError
from loradeck.lora.patterns import LENGTH, Patterns, PatternTable, why_invalid

PATHS = [
    "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "model.visual.blocks.3.attn.q_proj", "lm_head",
    "model.language_model.layers.2.self_attn.k_proj", "transformer.h.7.attn.c_attn", "q_proj", "layers.1", "",
]  # fmt: skip
REAL = [
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:k_proj|v_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))",
    r"(?!.*visual).*q_proj", r"layers\.(?:[0-9]|1[01])\..*", r"^(?!lm_head).*(?<!k_proj)$", r".*\.(\d+)\..*_proj",
    r"(?:(?:model\.)+(?:[a-z_]+\.)*)?layers\.\d+\.self_attn\.[qkv]_proj", "model.layers.0.self_attn.q_proj", "q_proj",
    r"h\.7\.attn", "self_attn", r"(q|k)_proj", r"\w+", "", r"[a-z_.0-9]*?\.mlp\..*|lm_head",
]  # fmt: skip


@pytest.mark.parametrize("first", REAL)
def test_they_match_as_peft_has_it(first):
    for keys in ([first], [first, "lm_head", ".*"], ["attn.q_proj", first]):
        table = PatternTable("rank_pattern", {key: key for key in keys})
        for path in PATHS:
            matching = [key for key in keys if re.match(rf"(.*\.)?({key})$", path)]
            assert table.get(path, None) == (get_pattern_key(keys, path) if matching else None)


@pytest.mark.parametrize("pattern", REAL)
def test_whole_paths(pattern):
    patterns = Patterns("target_modules", [pattern])
    for path in PATHS:
        assert (patterns.first(path) == 0) == (re.fullmatch(pattern, path) is not None)


def test_one_path_takes_too_long():
    with pytest.raises(ConfigError, match=r"target_modules has '\(\.\{1,200\}\).* takes too long"):
        Patterns("target_modules", ["(.{1,200}){1,200}[!?]"]).first("a" * 60)


def test_many_paths_take_too_long_together():
    """Each by far within the bound, and different, so that none is known already."""
    patterns = Patterns("target_modules", ["(.{1,200}){1,200}[!?]"])
    seconds = []

    def match_all():
        for i in range(100_000):
            patterns.first(f"{i:018}")
            seconds.append(patterns._left)

    with pytest.raises(ConfigError, match="takes too long"):
        match_all()
    assert len(seconds) > 3
    assert seconds == sorted(seconds, reverse=True)
    with pytest.raises(ConfigError, match="takes too long"):
        patterns.first("q_proj")


def test_what_is_known_already_takes_no_time():
    patterns = Patterns("target_modules", [r"(.*a){1,20}b"])
    patterns.first("a" * 20)
    left = patterns._left
    for _ in range(100):
        patterns.first("a" * 20)
    assert patterns._left == left


@pytest.mark.parametrize("pattern", ["(", "*", "x{4294967296}", "a" * (LENGTH + 1), "(" * 5000 + ")" * 5000, "[b-a]"])
def test_what_is_no_regex(pattern):
    assert why_invalid(pattern)
