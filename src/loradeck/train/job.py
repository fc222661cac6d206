"""One adapter being trained: its settings, its optimizer, its progress.

A job's next step depends on its own state alone, not on its neighbours in the pass or on a restart of the process.
"""

import hashlib
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PretrainedConfig

from loradeck.dataset.example import Example, Preference
from loradeck.errors import TrainingError
from loradeck.lora.adapter import Adapter
from loradeck.train.batching import BatchSampler
from loradeck.train.config import TrainConfig
from loradeck.train.events import End, EndReason, Evaluation, Step
from loradeck.train.objective import Outcome, Unit, objective_of
from loradeck.train.schedule import Schedule

BETAS = (0.9, 0.95)  # Tinker's AdamW: the second moment forgets in 20 steps, and many LoRA runs have only 50
FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which torch's AdamW is one kernel for all tensors
EVALUATIONS = 10  # in a run, unless the config says otherwise
STATM = Path("/proc/self/statm")


@dataclass(slots=True)
class Progress:
    """How far a job is: with its tensors, everything that a checkpoint needs."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens read, without padding."""
    losses: list[float] = field(default_factory=list)
    """Of each step."""
    accuracy: float | None = None
    """Of labels or preference pairs, in the last step."""
    margin: float | None = None
    """Of preference pairs, in the last step."""
    validation: dict[int, float] = field(default_factory=dict)
    """Validation losses by step."""
    best_loss: float | None = None
    """The lowest validation loss."""
    best_step: int = 0
    waiting: int = 0
    """Evaluations since the best one."""
    end: End | None = None


@dataclass(slots=True)
class Sums:
    """What is added up over the units of a step or an evaluation."""

    loss: float = 0.0
    margin: float | None = None
    """Of preference pairs."""
    correct: int | None = None
    """Labels that are the most likely ones, or pairs with a margin above 0."""

    def add(self, outcome: Outcome) -> None:
        """Add what an objective gave for some units."""
        self.loss += float(outcome.losses.detach().sum())
        if outcome.margins is not None:
            self.margin = (self.margin or 0.0) + float(outcome.margins.detach().sum())
        if outcome.correct is not None:
            self.correct = (self.correct or 0) + int(outcome.correct.sum())

    def numbers(self) -> list[float]:
        """Return them as numbers that can be added to those of other processes, which may have no margin yet."""
        there = [float(each is not None) for each in (self.margin, self.correct)]
        return [self.loss, self.margin or 0.0, float(self.correct or 0), *there]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Sums":
        """Return the sums of `numbers`."""
        loss, margin, correct, has_margin, has_correct = numbers
        return cls(loss, margin if has_margin else None, int(correct) if has_correct else None)

    def quality(self, count: int) -> dict[str, float]:
        """Return the accuracy and the mean margin over `count`, as far as the objective has them."""
        sums = {"accuracy": self.correct, "margin": self.margin}
        return {name: value / count for name, value in sums.items() if value is not None}


class Job:
    """An adapter, its examples, its settings and its optimizer."""

    def __init__(
        self,
        name: str,
        adapter: Adapter,
        train: Sequence[Example] | Sequence[Preference],
        config: TrainConfig,
        model: PretrainedConfig,
        *,
        task: str = "generate",
        valid: Sequence[Example] | Sequence[Preference] = (),
    ) -> None:
        self.name, self.adapter, self.config = name, adapter, config
        self.train, self.valid = train, valid
        self.objective = objective_of(task, config, preferences=isinstance(train[0], Preference))
        self.schedule = Schedule.of(config, len(train), model, preferences=self.objective.needs_reference)
        self.eval_every = config.eval_every or math.ceil(self.schedule.steps / EVALUATIONS)
        self.optimizer = _optimizer(adapter, config)
        self.reference: str | None = None
        """The resident adapter that DPO compares with; None for the base."""
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        """The adapter's tensors at the lowest validation loss."""
        self.last: dict[str, Tensor] = {}
        """Those of the last step, once the job has ended with the best ones."""
        self._sampler: BatchSampler[Example | Preference] = BatchSampler(train, config.batch_size, seed=config.seed)
        self.sums = Sums()
        """Of the current step."""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.progress.end is None

    @property
    def finished(self) -> bool:
        """Whether it has taken all its steps; more of them may be asked for later."""
        return self.progress.end is not None and self.progress.end.reason == "finished"

    @property
    def can_go_on(self) -> bool:
        """Whether it has taken all the steps of an earlier schedule, and its present one has more."""
        return self.finished and self.progress.step < self.schedule.steps

    def units(self) -> list[Unit]:
        """Return what the next step trains on."""
        return [example.sequences for example in self._sampler[self.progress.step]]

    def valid_units(self) -> Iterator[Unit]:
        """Yield what an evaluation runs on."""
        return (example.sequences for example in self.valid)

    def seed_dropout(self, index: int, share: tuple[int, int, int] | None) -> None:
        """Make the next forward's dropout masks depend on the seed, the step and the micro-batch's index alone.

        `share` is as in `Dropout`.
        """
        if self.adapter.dropout is not None:
            self.adapter.dropout.share = share
            text = f"{self.config.seed} {self.progress.step} {index}"
            self.adapter.dropout.seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())

    def discard(self) -> None:
        """Forget what was added up for a step that is not taken."""
        self.optimizer.zero_grad()
        self.sums = Sums()

    def update(self, units: Sequence[Unit], pass_start: float, clock: Callable[[], float]) -> Step:
        """Take an optimizer step with the accumulated gradients. `clock` gives the run's seconds, as `pass_start`.

        Raises:
            TrainingError: the loss or the gradient is NaN or infinite; the adapter stays as before this step.
        """
        config, progress = self.config, self.progress
        count = self.objective.count(units)
        sums, self.sums = self.sums, Sums()
        loss = sums.loss / count
        parameters = [*self.adapter.parameters()]
        norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
        rate = self.schedule(progress.step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad()
            raise TrainingError(
                f"training {self.name!r} diverged at step {progress.step + 1}: the loss is {loss}, the norm of its "
                f"gradient {norm}",
                hint=f"Lower learning_rate, which was {rate:.2g}. The adapter is the one before this step.",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        progress.tokens += sum(len(example.tokens) for unit in units for example in unit)
        progress.losses.append(loss)
        quality = sums.quality(count)
        progress.accuracy, progress.margin = quality.get("accuracy"), quality.get("margin")
        seconds = clock()
        return Step(
            job=self.name,
            step=progress.step,
            seconds=seconds,
            took=seconds - pass_start,
            steps=self.schedule.steps,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=progress.tokens,
            supervised=count,
            memory=_resident_bytes(),
            **quality,
        )

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation is still to come after the last step taken."""
        step = self.progress.step
        if not (self.valid and step) or step in self.progress.validation:
            return False
        return step % self.eval_every == 0 or step == self.schedule.steps

    def record_evaluation(self, sums: "Sums", count: int, seconds: float) -> Evaluation:
        """Record a validation loss, a sum over `count`, and keep a copy of the adapter if it is the lowest.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        progress, mean = self.progress, sums.loss / count
        if not math.isfinite(mean):
            raise TrainingError(
                f"training {self.name!r} diverged at step {progress.step}: the validation loss is {mean}",
                hint="Lower learning_rate.",
            )
        progress.validation[progress.step] = mean
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
            tokens=count,
            best=best,
            **sums.quality(count),
        )

    def end_reason(self) -> tuple[EndReason, str] | None:
        """Return the reason and detail if the job has finished or should stop early, else None."""
        progress, patience = self.progress, self.config.patience
        if progress.step >= self.schedule.steps:
            return "finished", ""
        if patience is not None and progress.waiting >= patience:
            return "early stop", f"{progress.waiting} evaluations without a loss below {progress.best_loss:.4f}"
        return None

    def finish(self, reason: EndReason, detail: str, seconds: float) -> End:
        """End the job; its adapter becomes the best by validation loss, else stays the last."""
        progress = self.progress
        kept_step = progress.best_step if self.best else progress.step
        self.keep_best()
        if self.adapter.dropout is not None:
            self.adapter.dropout.seed = self.adapter.dropout.share = None
        progress.end = End(
            job=self.name, step=progress.step, seconds=seconds, reason=reason, kept=kept_step, detail=detail
        )
        return progress.end

    @torch.no_grad()
    def keep_best(self) -> None:
        """Replace the adapter's tensors by the best ones, if there are any; `last` has the replaced ones."""
        if self.best:
            self.last = {key: tensor.detach().clone() for key, tensor in self.adapter.tensors()}
            for key, tensor in self.adapter.tensors():
                tensor.copy_(self.best[key])


def _optimizer(adapter: Adapter, config: TrainConfig) -> AdamW:
    """Return AdamW over A and over B, whose learning rates may differ (LoRA+); modules that are saved have A's."""
    pairs = [adapter.pair(path) for path in adapter.sites]
    heads = [parameter for path in adapter.saved for parameter in adapter.saved_module(path).values()]
    added: dict[bool, list[nn.Parameter]] = {True: [], False: []}  # parts of A and of B for tokens beyond the base's
    for path, rows in adapter.added.items():
        if rows.pair is not None:
            added[adapter.sites[path].kind == "embedding"].append(adapter.added_rows(rows.pair))
    groups = [
        {"params": [*(a for a, _ in pairs), *added[True], *heads], "ratio": 1.0},
        {"params": [*(b for _, b in pairs), *added[False]], "ratio": config.loraplus_lr_ratio},
    ]
    fused = next(adapter.parameters()).device.type in FUSED
    return AdamW(groups, betas=BETAS, weight_decay=config.weight_decay, fused=fused)


def _resident_bytes() -> int:
    """Return the resident set of this process in bytes; on macOS its peak."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
