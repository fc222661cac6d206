"""The steps of a job and their learning rates."""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from loradeck.train.config import Decay, TrainConfig

# LoRA Without Regret (Thinking Machines, 2025): the best rate for LoRA is 10 times that for full fine-tuning, 5e-5,
# and falls with the width of the base as a power law, fitted for each family.
RATE, WIDTH, POWERS = 10 * 5e-5, 2000, {"llama": 0.781, "qwen": 0.0775}
LOWEST, HIGHEST = 1e-4, 1e-3  # the fit is not trusted beyond these
UNKNOWN = 2e-4  # the default of axolotl and Unsloth
# Preference pairs take a lower rate: a quarter of SFT's up to 100 steps, as measured on 60 to 200 pairs
# (benchmarks/suites/preferences.py), falling to a twentieth from 500 steps on, as Tinker's guide recommends.
DPO_FACTOR, DPO_LOWEST, DPO_STEPS = 0.25, 0.05, 100
SHORT_RUN, SHORT_RUN_FACTOR = 100, 1.5  # a run of few steps can afford larger ones


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning rate for each of `steps` steps: a linear rise over the first `warmup` of them, then the decay.

    It is never zero: a step at a rate of zero would be wasted.
    """

    steps: int
    peak: float
    reason: str
    """Why the peak has this value."""
    warmup: int
    decay: Decay

    @classmethod
    def of(
        cls, config: TrainConfig, examples: int, model: PretrainedConfig, *, preferences: bool = False
    ) -> "Schedule":
        """Return the schedule of a job with this number of examples on such a model."""
        steps = config.max_steps or config.epochs * math.ceil(examples / config.batch_size)
        peak, reason = (config.learning_rate, "as given") if config.learning_rate else automatic(model, steps)
        if preferences and not config.learning_rate:
            factor = max(DPO_LOWEST, DPO_FACTOR * min(1, DPO_STEPS / steps))
            peak, reason = peak * factor, f"{reason}; times {factor:.2g} for preference pairs in {steps} steps"
        return cls(steps, peak, reason, math.ceil(config.warmup_ratio * steps), config.schedule)

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        share = (step - self.warmup) / (self.steps - self.warmup)
        factors = {"linear": 1 - share, "cosine": 0.5 + 0.5 * math.cos(math.pi * share), "constant": 1.0}
        return self.peak * factors[self.decay]


def automatic(model: PretrainedConfig, steps: int) -> tuple[float, str]:
    """Return a peak learning rate for A and B at the usual lora_alpha / r of 1 to 2, and the reason for it."""
    text = model.get_text_config()
    family = next((name for name in POWERS if text.model_type.startswith(name)), None)
    if family is None:
        peak, reason = UNKNOWN, f"the usual rate; there is no formula for {text.model_type}"
    else:
        fit = RATE * (WIDTH / text.hidden_size) ** POWERS[family]
        peak = min(max(fit, LOWEST), HIGHEST)
        reason = f"{RATE:g} · ({WIDTH} / {text.hidden_size})^{POWERS[family]} for {family}"
        if fit != peak:
            reason += f" = {fit:.2g}, clamped to {LOWEST:g} to {HIGHEST:g}"
    if steps < SHORT_RUN:
        return (
            peak * SHORT_RUN_FACTOR,
            f"{reason}; times {SHORT_RUN_FACTOR}, as the run has fewer than {SHORT_RUN} steps",
        )
    return peak, reason
