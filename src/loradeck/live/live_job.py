"""A job's run in the thread of an engine: its passes, and what it tells of them."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from loradeck.base.load import Base
from loradeck.errors import Interruption
from loradeck.live.answers import answerer
from loradeck.live.footprint import KEPT_MODELS
from loradeck.live.job_folder import JobFolder, remove
from loradeck.live.job_store import JobStore
from loradeck.live.live_trainer import Passes
from loradeck.live.records import Level
from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.train.events import AnyEvent, End, Sample, Step
from loradeck.train.job import Job
from loradeck.train.job_data import JobData
from loradeck.train.recipe import RunRecipe
from loradeck.train.run import Run

GOOD_ENDS = ("finished", "early stop")
CHARACTERS = 4000  # of each text of a sample


class LiveJob:
    """A run of one job, from its newest checkpoint to its end."""

    def __init__(
        self,
        recipe: RunRecipe,
        data: Mapping[str, JobData],
        folder: JobFolder,
        jobs: JobStore,
        on_change: Callable[[str], None],
    ) -> None:
        """`on_change` is called with the job's id after each event."""
        self.id = recipe.jobs[0].name
        self.end: End | None = None
        """How it ended."""
        self._recipe, self._data, self._folder = recipe, data, folder
        self._jobs, self._on_change = jobs, on_change
        self._tokens = 0
        self._metrics: dict[str, float] = {}
        self._samples: list[dict[str, str]] = []
        """Of the evaluation that is being told."""
        self._clock: Callable[[Step], int] = lambda _: 0

    def passes(self, base: Base, bank: Bank) -> Passes:
        """Take a pass between two yields; interrupted, write a checkpoint.

        Raises:
            LoradeckError: the run cannot begin, or a checkpoint cannot be written.
        """
        try:
            answer = answerer(base, bank) if base.task == "generate" else None
            run = Run(
                self._recipe, self._folder.path, base, bank=bank, data=self._data, answer=answer, on_event=self._tell
            )
            run.resume()
            job = run.trainer.jobs[self.id]
            self._begin(job)
            try:
                yield
                for _ in run.trainer:
                    self._after_pass(run, job)
                    yield
            except Interruption:
                run.checkpoint()
                raise
            run.checkpoint()
            self.end = job.progress.end
        finally:
            for name in (self.id, f"{self.id}.reference"):
                if name in bank:
                    bank.unload(name)

    def _begin(self, job: Job) -> None:
        """Forget what was told of steps that are about to be taken again."""
        step = job.progress.step
        self._tokens, self._clock = job.progress.tokens, partial(_finish, time.monotonic(), step)
        self._jobs.truncate_events(self.id, step)
        models = [*self._folder.models.iterdir()] if self._folder.models.is_dir() else []
        for model in (model for model in models if int(model.name) > step):
            self._jobs.remove_checkpoint(self.id, int(model.name))
            remove([model])

    def _after_pass(self, run: Run, job: Job) -> None:
        step, end = job.progress.step, job.progress.end
        epoch = math.ceil(len(job.train) / job.config.batch_size)
        if step and (step % epoch == 0 or end is not None) and (end is None or end.reason in GOOD_ENDS):
            self._keep_model(job)
        if run.trainer.passes % self._recipe.shared.checkpoint_every == 0 and job.running:
            run.checkpoint()

    def _keep_model(self, job: Job) -> None:
        """Keep the adapter as it is after this step as one that requests can name, and remove the oldest of these."""
        step = job.progress.step
        _last(job).save(self._folder.models / f"{step}")
        self._jobs.add_checkpoint(self.id, step, {"step": step, **self._metrics})
        self._jobs.add_event(self.id, f"Checkpoint created at step {step}", {"step": step})
        for model in sorted(self._folder.models.iterdir(), key=lambda path: int(path.name))[:-KEPT_MODELS]:
            self._jobs.remove_checkpoint(self.id, int(model.name))
            remove([model])
        self._on_change(self.id)

    def _tell(self, event: AnyEvent) -> None:
        if isinstance(event, Sample):
            self._tell_sample(event)
            return
        if isinstance(event, End):
            if event.reason in GOOD_ENDS and event.detail:  # else the job fails of it
                level: Level = "warn" if event.reason == "finished" else "info"
                self._jobs.add_event(self.id, f"{event.reason}: {event.detail}", {"step": event.step}, level=level)
                self._on_change(self.id)
            return
        if isinstance(event, Step):
            data = {
                "step": event.step,
                "total_steps": event.steps,
                "train_loss": event.loss,
                "train_accuracy": event.accuracy,
                "learning_rate": event.learning_rate,
                "tokens": event.tokens,
                "tokens_per_second": (event.tokens - self._tokens) / event.took if event.took else None,
            }
            self._tokens = event.tokens
            self._metrics["train_loss"] = event.loss
            self._jobs.update(
                self.id,
                sync=False,
                steps=event.step,
                total_steps=event.steps,
                trained_tokens=event.tokens,
                estimated_finish=self._clock(event),
            )
            message = f"Step {event.step}/{event.steps}: training loss={event.loss:.4f}"
        else:
            data = {"step": event.step, "valid_loss": event.loss, "valid_accuracy": event.accuracy}
            self._metrics["valid_loss"] = event.loss
            message = f"Step {event.step}: validation loss={event.loss:.4f}"
        figures = {name: value for name, value in data.items() if value is not None}
        self._jobs.add_event(self.id, message, figures)
        self._on_change(self.id)

    def _tell_sample(self, sample: Sample) -> None:
        """Tell the samples of an evaluation at once, with the last of them."""
        self._samples.append({name: _excerpt(getattr(sample, name)) for name in ("prompt", "expected", "answer")})
        count = len(self._samples)
        if count == min(self._recipe.shared.samples, len(self._data[self.id].valid)):
            data = {"step": sample.step, "samples": self._samples}
            self._jobs.add_event(self.id, f"Step {sample.step}: {count} sample{'s' * (count > 1)}", data)
            self._samples = []
            self._on_change(self.id)


def _finish(start: float, begun: int, event: Step) -> int:
    """Return when a job will have taken its steps, if it goes on as since `start`, at the step `begun`."""
    each = (time.monotonic() - start) / max(1, event.step - begun)
    return int(time.time() + each * (event.steps - event.step))


def _excerpt(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"


@torch.no_grad()
def _last(job: Job) -> Adapter:
    """Return the adapter as it is after the last step, also if the job has ended with an earlier one."""
    adapter = job.adapter.copy(trainable=False)
    for key, tensor in adapter.tensors():
        if key in job.last:
            tensor.copy_(job.last[key])
    return adapter
