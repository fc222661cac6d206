from typing import Any

import pytest

from loradeck.dataset.config import DataConfig
from loradeck.errors import ConfigError


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "question", "completion": "answer, in full"},
        "prompt=question,completion=answer, in full",
        " prompt = question , completion = answer, in full ",
    ],
)
def test_columns_are_a_mapping_or_its_text(columns: Any) -> None:
    config = DataConfig(columns=columns)
    assert config.source_columns == {"prompt": "question", "completion": "answer, in full"}
    assert config == DataConfig(columns=dict(config.source_columns))
    assert len({config, DataConfig(columns=columns)}) == 1


def test_without_columns_nothing_is_renamed() -> None:
    assert DataConfig(columns={}) == DataConfig(columns="") == DataConfig()
    assert DataConfig().source_columns == {}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"columns": "question"}, "is not a list of ours=theirs"),
        ({"columns": "prompt=a,prompt=b"}, "is not a list of ours=theirs"),
        ({"columns": "prompt="}, "must map our names"),
        ({"columns": ["prompt"]}, "must map our names"),
        ({"columns": {"prompt": 1}}, "must map our names"),
        ({"columns": "question=prompt"}, "'question' is no key of a record\nWrite prompt=question"),
        ({"columns": "prom=question"}, "'prom' is no key of a record\nThere are "),
        ({"encoding": "cp-none"}, "unknown encoding 'cp-none'"),
        ({"encoding": 7}, "unknown encoding 7"),
        ({"skip_long": "yes"}, "skip_long must be true or false"),
        ({"fold_system": 1}, "fold_system must be true or false"),
    ],
)
def test_what_is_no_setting(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        DataConfig(**values)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("encoding", ["base64", "hex", "rot13", "zip", "undefined"])
def test_a_codec_that_is_no_encoding_of_text_is_unknown(encoding: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown encoding '{encoding}'"):
        DataConfig(encoding=encoding)
