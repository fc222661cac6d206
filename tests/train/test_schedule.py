import pytest
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from loradeck.train.config import TrainConfig
from loradeck.train.schedule import Schedule, automatic


def schedule(examples: int = 100, **config: object) -> Schedule:
    return Schedule.of(TrainConfig(learning_rate=1.0, **config), examples, LlamaConfig())  # type: ignore[arg-type]


def test_linear_rises_to_the_peak_and_falls_towards_zero() -> None:
    rates = schedule(max_steps=10, warmup_ratio=0.2)
    assert [rates(step) for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )


def test_cosine_is_at_half_the_peak_halfway() -> None:
    rates = schedule(max_steps=8, warmup_ratio=0, schedule="cosine")
    assert rates(0) == 1
    assert rates(4) == pytest.approx(0.5)
    assert 0 < rates(7) < 0.05


def test_constant_stays() -> None:
    rates = schedule(max_steps=4, warmup_ratio=0.25, schedule="constant")
    assert [rates(step) for step in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_no_step_has_a_rate_of_zero(steps: int, ratio: float, decay: str) -> None:
    rates = schedule(max_steps=steps, warmup_ratio=ratio, schedule=decay)
    assert all(0 < rates(step) <= 1 for step in range(steps))


def test_steps_are_whole_batches_of_every_epoch() -> None:
    assert schedule(examples=9, batch_size=4, epochs=3).steps == 9
    assert schedule(examples=9, batch_size=4, epochs=3, max_steps=5).steps == 5


def test_the_automatic_rate_follows_width_and_family() -> None:
    wide, reason = automatic(LlamaConfig(hidden_size=4096), 1000)
    assert wide == pytest.approx(2.857e-4, rel=1e-3)  # 5e-4 (2000 / 4096)^0.781, by hand
    assert "llama" in reason
    narrow, reason = automatic(LlamaConfig(hidden_size=576), 1000)
    assert narrow == 1e-3
    assert "clamped to" in reason
    assert automatic(Qwen3Config(hidden_size=2000), 1000)[0] == pytest.approx(5e-4)


def test_the_automatic_rate_of_an_unknown_family_and_of_a_short_run() -> None:
    assert automatic(GPT2Config(), 1000)[0] == 2e-4
    rate, reason = automatic(GPT2Config(), 50)
    assert rate == pytest.approx(3e-4)
    assert "fewer than 100 steps" in reason


def test_pairs_take_a_lower_rate_the_longer_the_run() -> None:
    """A quarter of SFT's up to 100 steps, a twentieth from 500 on, and a given rate as it is."""

    def ratio(steps: int) -> float:
        config = TrainConfig(max_steps=steps)
        pairs, sft = (Schedule.of(config, 9, GPT2Config(), preferences=each).peak for each in (True, False))
        return pairs / sft

    assert [ratio(steps) for steps in (1, 24, 100, 200, 500, 9000)] == pytest.approx(
        [0.25, 0.25, 0.25, 0.125, 0.05, 0.05]
    )
    assert Schedule.of(TrainConfig(learning_rate=0.1), 9, GPT2Config(), preferences=True).peak == 0.1


def test_a_given_rate_is_used() -> None:
    assert (schedule().peak, schedule().reason) == (1.0, "as given")
