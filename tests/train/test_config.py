import dataclasses
import math

import pytest

from loradeck.errors import ConfigError
from loradeck.train.config import PassConfig, TrainConfig

INVALID = {
    "learning_rate": [0, -1e-4, math.nan, math.inf, "1e-3", True, 10**400],
    "epochs": [0, -1, 1.5, None, True],
    "max_steps": [0, 2.0],
    "batch_size": [0, "4"],
    "max_length": [1, None],
    "warmup_ratio": [-0.1, 1.1, math.nan],
    "schedule": ["step", None, 1],
    "weight_decay": [-0.1, math.inf],
    "max_grad_norm": [0, -1, math.nan, None],
    "seed": [-1, 1.0, 2**64],
    "loraplus_lr_ratio": [0, -1, math.nan, "2"],
    "dpo_beta": [0, -0.1, None],
    "dpo_sft_weight": [-0.1, math.nan, None],
    "valid_ratio": [-0.1, 1, math.nan],
    "eval_every": [0, 1.5],
    "patience": [0, True],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in INVALID.items() for value in values])
def test_an_invalid_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{field: value})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{field} must be ")
    assert problem.endswith(f", not {value!r:.40}")
    assert caught.value.hint_for("python")
    assert caught.value.hint_for("cli")


def test_every_invalid_value_is_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(epochs=0, schedule="step", seed=-1)  # type: ignore[arg-type]
    assert [problem.split()[0] for problem in caught.value.problems] == ["epochs", "schedule", "seed"]


def test_every_field_is_checked() -> None:
    assert INVALID.keys() == {field.name for field in dataclasses.fields(TrainConfig)}


def test_the_settings_of_a_pass_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="invalid PassConfig") as caught:
        PassConfig(max_tokens=0, gradient_checkpointing=1, checkpoint_every=True, keep_checkpoints=1.5, samples=-1)  # type: ignore[arg-type]
    fields = [field.name for field in dataclasses.fields(PassConfig)]
    assert [problem.split()[0] for problem in caught.value.problems] == fields


def test_values_at_the_limits() -> None:
    TrainConfig(
        learning_rate=1, epochs=1, max_steps=1, batch_size=1, max_length=2, warmup_ratio=1, max_grad_norm=math.inf
    )
    TrainConfig(warmup_ratio=0, weight_decay=0.1, schedule="cosine", seed=2**63 - 1)
