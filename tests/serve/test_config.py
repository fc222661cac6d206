"""The bounds of an engine."""

from dataclasses import fields

import pytest

from loradeck.errors import ConfigError
from loradeck.serve.config import EngineConfig


@pytest.mark.parametrize("name", [field.name for field in fields(EngineConfig) if field.type in (int, float)])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_every_bound_is_above_0(name: str, value: float) -> None:
    if (name, value) == ("num_speculative_tokens", 0):
        assert EngineConfig(num_speculative_tokens=0)
        return
    with pytest.raises(ConfigError, match=f"{name}="):
        EngineConfig(**{name: value})  # type: ignore[arg-type]


def test_all_that_is_wrong_is_told() -> None:
    with pytest.raises(ConfigError, match="patience=0; loaders=-1"):
        EngineConfig(patience=0, loaders=-1)


def test_a_step_has_room_for_a_token_of_every_row() -> None:
    EngineConfig(max_rows=8, max_step_tokens=8)
    with pytest.raises(ConfigError, match="max_step_tokens=7 is below max_rows=8"):
        EngineConfig(max_rows=8, max_step_tokens=7)


def test_activations_have_names() -> None:
    with pytest.raises(ConfigError, match="unknown activations 'int4'") as caught:
        EngineConfig(activations="int4")  # type: ignore[arg-type]
    assert caught.value.hint == "Give auto, int8, plain."
