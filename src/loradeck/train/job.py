"""One adapter being trained: its recipe, its optimizer, how far it is. Knows tensors; computes nothing on the model.

A job's next step is a function of its own state alone: neighbours in the pass, and whether the process was begun anew,
make no difference to it.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PretrainedConfig

from loradeck.dataset.example import Example, Preference
from loradeck.errors import TrainingError
from loradeck.lora.adapter import Adapter
from loradeck.train.batching import Batches
from loradeck.train.config import TrainConfig
from loradeck.train.events import End, Evaluation, Step
from loradeck.train.memory import resident_bytes
from loradeck.train.objective import DPO, SFT, Objective, Unit
from loradeck.train.schedule import Schedule

BETAS = (0.9, 0.95)  # Tinker's AdamW: the second moment forgets in 20 steps, and many a run of LoRA has but 50
FUSED = ("cpu", "cuda", "mps", "xpu")  # where torch has AdamW as one kernel for all tensors
EVALUATIONS = 10  # of a run, where the recipe does not say


@dataclass(slots=True)
class Progress:
    """How far a job is: with its tensors, all that a checkpoint must hold."""

    step: int = 0
    """Optimizer steps made."""
    tokens: int = 0
    """Read so far, none of them padding."""
    losses: list[float] = field(default_factory=list)
    """Of each step."""
    best_loss: float | None = None
    """The lowest validation loss."""
    best_step: int = 0
    waiting: int = 0
    """Evaluations since then."""
    end: End | None = None


class Job:
    """An adapter, its examples, its recipe and its optimizer."""

    def __init__(
        self,
        name: str,
        adapter: Adapter,
        train: Sequence[Example] | Sequence[Preference],
        config: TrainConfig,
        model: PretrainedConfig,
        *,
        valid: Sequence[Example] | Sequence[Preference] = (),
    ) -> None:
        self.name, self.adapter, self.config = name, adapter, config
        self.train, self.valid = train, valid
        preferences = isinstance(train[0], Preference)
        self.objective: Objective = DPO(config.dpo_beta) if preferences else SFT()
        self.schedule = Schedule.of(config, len(train), model, preferences=preferences)
        self.eval_every = config.eval_every or math.ceil(self.schedule.steps / EVALUATIONS)
        self.optimizer = _optimizer(adapter, config)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self._batches: Batches[Example | Preference] = Batches(train, config.batch_size, seed=config.seed)
        self._loss, self._right = 0.0, 0

    @property
    def running(self) -> bool:
        """Whether it has steps to make."""
        return self.progress.end is None

    def units(self) -> list[Unit]:
        """Return what the next step learns from."""
        return [self.objective.unit(example) for example in self._batches[self.progress.step]]

    def valid_units(self) -> list[Unit]:
        """Return what an evaluation is made on."""
        return [self.objective.unit(example) for example in self.valid]

    def seed_dropout(self, piece: int) -> None:
        """Make the masks of the coming forward a function of the seed, the step and the piece alone."""
        if self.adapter.dropout is not None:
            text = f"{self.config.seed} {self.progress.step} {piece}"
            self.adapter.dropout.seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())

    def note(self, losses: Tensor, right: Tensor | None) -> None:
        """Add the losses of some units of the coming step to its loss."""
        self._loss += float(losses.detach().sum())
        self._right += 0 if right is None else int(right.sum())

    def update(self, units: Sequence[Unit], began: float, clock: Callable[[], float]) -> Step:
        """Make the optimizer's step with the gradients that were summed since the pass began, by the run's clock.

        Raises:
            TrainingError: the loss or the gradient is NaN or infinite; the adapter is the one before this step.
        """
        config, progress = self.config, self.progress
        weight = self.objective.weight(units)
        loss, right = self._loss / weight, self._right / weight
        self._loss, self._right = 0.0, 0
        parameters = [*self.adapter.parameters()]
        norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
        rate = self.schedule(progress.step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise TrainingError(
                f"training {self.name!r} diverged at step {progress.step + 1}: the loss is {loss}, its gradient's norm "
                f"{norm}",
                hint=f"Lower learning_rate, which was {rate:.2g}. The adapter is the one before this step.",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        progress.tokens += sum(len(document.tokens) for unit in units for document in unit)
        progress.losses.append(loss)
        seconds = clock()
        return Step(
            job=self.name,
            step=progress.step,
            seconds=seconds,
            took=seconds - began,
            steps=self.schedule.steps,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=progress.tokens,
            supervised=weight,
            memory=resident_bytes(),
            accuracy=right if self.objective.compares else None,
        )

    @property
    def due(self) -> bool:
        """Whether the step just made is one to evaluate."""
        at = self.progress.step
        return bool(self.valid) and (at % self.eval_every == 0 or at == self.schedule.steps)

    def evaluated(self, loss: float, right: int, weight: int, seconds: float) -> Evaluation:
        """Take note of a validation loss, a sum over `weight`, and keep the adapter that has the lowest.

        Raises:
            TrainingError: it is NaN or infinite.
        """
        progress, mean = self.progress, loss / weight
        if not math.isfinite(mean):
            raise TrainingError(
                f"training {self.name!r} diverged at step {progress.step}: the validation loss is {mean}",
                hint="Lower learning_rate.",
            )
        best = progress.best_loss is None or mean < progress.best_loss
        progress.waiting = 0 if best else progress.waiting + 1
        if best:
            progress.best_loss, progress.best_step = mean, progress.step
            self.best = {key: tensor.detach().clone() for key, tensor in self.adapter.tensors()}
        return Evaluation(
            job=self.name,
            step=progress.step,
            seconds=seconds,
            loss=mean,
            tokens=weight,
            best=best,
            accuracy=right / weight if self.objective.compares else None,
        )

    def ending(self) -> tuple[str, str] | None:
        """Say why the job is at its end, if it is: a reason and its detail."""
        progress, patience = self.progress, self.config.patience
        if progress.step >= self.schedule.steps:
            return "finished", ""
        if patience is not None and progress.waiting >= patience:
            return "early stop", f"{progress.waiting} evaluations without a loss below {progress.best_loss:.4f}"
        return None

    @torch.no_grad()
    def finish(self, reason: str, detail: str, seconds: float) -> End:
        """End the job; its adapter is then the best by validation loss, else the last."""
        progress, kept = self.progress, self.progress.best_step if self.best else self.progress.step
        for key, tensor in self.adapter.tensors():
            if key in self.best:
                tensor.copy_(self.best[key])
        self.best = {}
        if self.adapter.dropout is not None:
            self.adapter.dropout.seed = None
        progress.end = End(
            job=self.name,
            step=progress.step,
            seconds=seconds,
            reason=reason,  # type: ignore[arg-type]
            kept=kept,
            detail=detail,
        )
        return progress.end


def _optimizer(adapter: Adapter, config: TrainConfig) -> AdamW:
    """Return AdamW over A and over B, whose learning rates may differ (LoRA+)."""
    pairs = [adapter.pair(path) for path in adapter.sites]
    groups = [
        {"params": [a for a, _ in pairs], "ratio": 1.0},
        {"params": [b for _, b in pairs], "ratio": config.loraplus_lr_ratio},
    ]
    fused = next(adapter.parameters()).device.type in FUSED
    return AdamW(groups, betas=BETAS, weight_decay=config.weight_decay, fused=fused)
