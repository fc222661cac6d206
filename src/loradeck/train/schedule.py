"""How many steps a run takes, at which learning rate. Knows numbers; knows no tensors and no files."""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from loradeck.train.config import Shape, TrainConfig

# LoRA Without Regret (Thinking Machines, 2025): the best rate of LoRA is 10 times that of full fine-tuning, 5e-5, and
# falls with the width of the base as a power that was fitted for each family.
RATE, WIDTH, POWERS = 10 * 5e-5, 2000, {"llama": 0.781, "qwen": 0.0775}
LOWEST, HIGHEST = 1e-4, 1e-3  # how far the fit is trusted
UNKNOWN = 2e-4  # the default of axolotl and Unsloth
GENTLE = 0.05  # preferences over answers: Tinker's guide takes a twentieth to a tenth of the rate for answers
SHORT_RUN, HASTE = 100, 1.5  # a run of few steps moves less far, and can afford longer ones


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning rate for each of `steps` steps: a linear rise over `warmup` of them, then the way down.

    Never zero: a step at a rate of zero would be computed for nothing.
    """

    steps: int
    peak: float
    reason: str
    """Why the peak is what it is, in words."""
    warmup: int
    shape: Shape

    @classmethod
    def of(
        cls, config: TrainConfig, examples: int, model: PretrainedConfig, *, preferences: bool = False
    ) -> "Schedule":
        """Return the schedule of a run over so many examples on such a model."""
        steps = config.max_steps or config.epochs * math.ceil(examples / config.batch_size)
        peak, reason = (config.learning_rate, "as given") if config.learning_rate else automatic(model, steps)
        if preferences and not config.learning_rate:
            peak, reason = peak * GENTLE, f"{reason}; times {GENTLE} for preference pairs"
        return cls(steps, peak, reason, math.ceil(config.warmup_ratio * steps), config.schedule)

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        decay = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "constant": 1.0}
        return self.peak * decay[self.shape]


def automatic(model: PretrainedConfig, steps: int) -> tuple[float, str]:
    """Pick a peak learning rate for A and B at the usual lora_alpha / r of 1 to 2, and say why."""
    text = model.get_text_config()
    family = next((name for name in POWERS if text.model_type.startswith(name)), None)
    if family is None:
        peak, reason = UNKNOWN, f"the usual rate, for want of a formula for {text.model_type}"
    else:
        fit = RATE * (WIDTH / text.hidden_size) ** POWERS[family]
        peak = min(max(fit, LOWEST), HIGHEST)
        reason = f"{RATE:g} · ({WIDTH} / {text.hidden_size})^{POWERS[family]} for {family}"
        if fit != peak:
            reason += f" = {fit:.2g}, kept within {LOWEST:g} to {HIGHEST:g}"
    if steps < SHORT_RUN:
        return peak * HASTE, f"{reason}; times {HASTE}, as the run has fewer than {SHORT_RUN} steps"
    return peak, reason
