"""The recipe of an adapter: which values can be, and what they mean for a module."""

import inspect
import math
import pickle
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft.utils.other import get_pattern_key

from loradeck import LoraConfig
from loradeck.errors import ConfigError
from loradeck.lora.patterns import literal_pattern

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "lm_head",
    "q_proj",
    "a.b-c.0",
    "q_projx",
]


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0}, {"r": -1}, {"r": 2.0}, {"r": True}, {"r": "8"}, {"r": 10**1000}, {"r": 65_537}, {"r": None},
        {"lora_alpha": math.nan}, {"lora_alpha": math.inf}, {"lora_alpha": 10**400}, {"lora_alpha": "16"},
        {"lora_dropout": 1.0}, {"lora_dropout": -0.1}, {"lora_dropout": math.nan}, {"lora_dropout": "0.1"},
        {"target_modules": []}, {"target_modules": ""}, {"target_modules": "(q_proj"}, {"target_modules": None},
        {"target_modules": 3}, {"target_modules": ["q", 3]}, {"rank_pattern": {"q": 0}}, {"rank_pattern": {"(": 3}},
        {"rank_pattern": {"(?i)q": 3}}, {"rank_pattern": {3: 3}}, {"rank_pattern": ["q"]}, {"rank_pattern": {"q": 2.5}},
        {"alpha_pattern": {"q": math.inf}}, {"exclude_modules": "["},
        {"layers_to_transform": "3"}, {"layers_to_transform": [1.5]}, {"layers_to_transform": True},
        {"use_rslora": "yes"}, {"layers_pattern": [3]},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**wrong)
    assert next(iter(wrong)) in str(caught.value)
    assert len(str(caught.value)) < 1000


THEIRS = {field.name for field in fields(PeftConfig)} - {field.name for field in fields(LoraConfig)}


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_a_setting_of_peft_that_is_not_supported_is_refused_by_its_name(name):
    with pytest.raises(ConfigError, match=f"LoraConfig does not support .*{name}='x' ") as caught:
        LoraConfig(r=4, **{name: "x"})
    assert caught.value.hint == "Leave these out."


def test_a_setting_of_peft_that_is_turned_off_asks_for_nothing():
    off = {"bias": "none", "use_dora": False, "modules_to_save": None, "lora_bias": False}
    assert LoraConfig(r=4, **off) == LoraConfig(r=4)
    with pytest.raises(ConfigError) as caught:
        LoraConfig(use_dora=True, bias="all", init_lora_weights="pissa")
    assert len(caught.value.problems) == 3


def test_an_argument_that_nobody_knows_is_a_type_error_as_everywhere_in_python():
    with pytest.raises(TypeError, match="rank"):
        LoraConfig(rank=4)
    assert [*inspect.signature(LoraConfig).parameters] == [field.name for field in fields(LoraConfig)]


def test_every_problem_is_in_one_error():
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_alpha=math.inf, lora_dropout=2, target_modules=[], rank_pattern={"q": -1, "(": 2})
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize(
    "right",
    [
        {"r": 65_536}, {"lora_alpha": 0}, {"lora_alpha": -8.5}, {"lora_dropout": 0.999}, {"layers_to_transform": 3},
        {"target_modules": "all-linear"}, {"target_modules": "attention"}, {"target_modules": {"q", "v"}},
        {"target_modules": ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"},  # the example in PEFT's own docstring
        {"target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.x\b)"},
        {"rank_pattern": {r"layers\.[0-9]+\.mlp\.(up|down)_proj": 3}}, {"rank_pattern": {"(foo\\.)?bar": 3}},
        {"alpha_pattern": {"^" + "model.layers." * 9 + "q": 3}}, {"alpha_pattern": {"a?" * 30: 1}},
        {"rank_pattern": {r"(?:.*?(layers|h)\.\d+\.)+(?!mlp)[a-z_]{1,40}_proj": 3}}, {"target_modules": (name for name in "qv")},
    ],
    ids="-".join,  # the names only: the text of a set differs between processes
)  # fmt: skip
def test_what_can_be_is_taken(right):
    config = LoraConfig(**right)
    assert pickle.loads(pickle.dumps(config)) == config


def test_scaling():
    assert LoraConfig(r=8, lora_alpha=16).scaling("x") == 2
    assert LoraConfig(r=4, lora_alpha=6, use_rslora=True).scaling("x") == 3
    config = LoraConfig(r=8, lora_alpha=16, rank_pattern={"q": 4}, alpha_pattern={"v": 2, "q": 12})
    assert [config.scaling(path) for path in ("a.q", "a.v", "a.k", "aq")] == [3, 0.25, 2, 2]


def test_patterns_are_looked_up_as_peft_does():
    patterns = [
        ["q_proj"], ["^q_proj"], [".*q_proj", "lm_head"], [r"layers\.1.*", "q_proj"], ["layers.0.self_attn.q_proj"],
        ["self_attn", "head"], ["q_proj|lm_head"], ["b-c.0"], [r"[a-z]+\.b-c\.\d"], ["^" + "model"], ["q_proj", ".*proj"],
        [r"^model\.layers\.0\.self_attn\.q_proj", r"^lm_head"], [r"^model.layers.0.self_attn.q_proj"],
    ]  # fmt: skip
    for keys in patterns:
        config = LoraConfig(r=9, rank_pattern={key: i + 1 for i, key in enumerate(keys)})
        for path in PATHS:
            found = get_pattern_key(keys, path)
            assert config.rank(path) == (keys.index(found) + 1 if found in keys else 9), (keys, path)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 8), max_size=4), st.text(max_size=8))
def test_literal_patterns_match_their_paths_and_no_other(ranks, other):
    """As we write them: for us, and for PEFT."""
    pattern = literal_pattern(ranks)
    config = LoraConfig(r=9, rank_pattern=pattern)
    for path in [*ranks, other]:
        assert config.rank(path) == ranks.get(path, 9)
        if "\n" not in path:  # PEFT's own lookup lets $ match before a final line break
            assert pattern.get(get_pattern_key(list(pattern), path), 9) == ranks.get(path, 9)


def test_of_modules_spells_everything_out():
    config = LoraConfig(
        r=8,
        lora_alpha=4,
        rank_pattern={"q": 2},
        alpha_pattern={".*v": 7},
        layers_to_transform=[1],
        exclude_modules=["k"],
    )
    own = config.of_modules({"l.1.q": 2, "l.1.v": 8}, ("q", "v"))
    assert own.target_modules == ("q", "v")
    assert own.exclude_modules == ()
    assert own.layers_to_transform is None
    assert [own.rank(path) for path in ("l.1.q", "l.1.v", "l.2.q")] == [2, 8, 8]
    assert [own.alpha(path) for path in ("l.1.q", "l.1.v", "l.2.v")] == [4, 7, 4]
    assert all(key.startswith("^") for key in [*own.rank_pattern, *own.alpha_pattern])
