"""The loop that trains adapters, any number of them in one pass over the base: batch -> losses -> gradients -> steps.

Knows tokens and jobs; knows no text and no files. Each pass makes one optimizer step of every running job. Documents
of several jobs lie in one batch, each routed through its own adapter, and the base is computed for all of them at once.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from loradeck.base.load import Base
from loradeck.dataset.example import Example, Preference
from loradeck.errors import ConfigError, DataError, TrainingError
from loradeck.lora.bank import Bank
from loradeck.train.batching import pieces
from loradeck.train.config import PassConfig, TrainConfig
from loradeck.train.events import AnyEvent, End, Listener
from loradeck.train.job import Job
from loradeck.train.loss import Losses
from loradeck.train.mode import evaluation, training
from loradeck.train.objective import Unit


@dataclass(frozen=True, slots=True)
class Part:
    """What one job has in one batch."""

    job: Job
    piece: int
    units: Sequence[Unit]

    @property
    def documents(self) -> list[Example]:
        return [document for unit in self.units for document in unit]

    @property
    def tokens(self) -> int:
        return sum(len(document.tokens) for document in self.documents)


class Trainer:
    """Jobs on one base. Iterate over it to train: `for _ in trainer` makes a pass at a time until all jobs ended.

    A job's losses and weights do not depend on the others: not on their data, rank or rate, nor on when they come, end
    or diverge. The base's weights are not touched.
    """

    def __init__(
        self,
        base: Base,
        bank: Bank,
        *,
        max_tokens: int = PassConfig.max_tokens,
        gradient_checkpointing: bool = False,
        on_event: Listener | None = None,
        on_evaluated: Callable[[Sequence[Job]], None] | None = None,
    ) -> None:
        """Begin without jobs. `max_tokens` are read at once; a larger step is computed in parts, to one gradient.

        `on_evaluated` gets the jobs of an evaluation, once all are told and before any ends.
        """
        self.base, self.bank = base, bank
        self.max_tokens, self.gradient_checkpointing = max_tokens, gradient_checkpointing
        self.jobs: dict[str, Job] = {}
        self.interrupted = False
        """Whether Ctrl-C, or `interrupt`, ended the iteration early."""
        self.passes = 0
        """Made so far."""
        self.seconds_before = 0.0
        """Of the run before it was resumed."""
        self._tell: Listener = on_event or (lambda _: None)
        self._evaluated = on_evaluated or (lambda _: None)
        self._losses = Losses(base.model)
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return self.seconds_before + time.perf_counter() - self._begun

    @property
    def running(self) -> list[Job]:
        """The jobs that have steps to make."""
        return [job for job in self.jobs.values() if job.running]

    def add(
        self,
        name: str,
        train: Sequence[Example] | Sequence[Preference],
        config: TrainConfig,
        *,
        valid: Sequence[Example] | Sequence[Preference] = (),
    ) -> Job:
        """Add a job for the resident adapter `name`; it joins at the next pass.

        Raises:
            DataError: there are no examples.
            ConfigError: an example is longer than the base can read, or the adapter has a job already.
            UnknownAdapterError: there is no such adapter.
            AdapterError: the adapter is frozen.
        """
        if not train:
            raise DataError("there are no examples to train on", hint="Give at least one.")
        if name in self.jobs:
            raise ConfigError(f"{name!r} has a job already", hint="One job trains one adapter.")
        self.bank.parameters(name)
        job = Job(name, self.bank[name], train, config, self.base.model.config, valid=valid)
        longest = max(len(document.tokens) for example in (*train, *valid) for document in job.objective.unit(example))
        if self.base.context is not None and longest > self.base.context:
            raise ConfigError(
                f"the longest example has {longest} tokens; {self.base.name} reads {self.base.context}",
                hint=f"Set max_length to {self.base.context} or less.",
            )
        self.jobs[name] = job
        return job

    def stop(self, name: str, detail: str) -> None:
        """End a job before its time; its adapter is the best by validation loss, else the last."""
        self._end(self.jobs[name], "stopped", detail)

    def interrupt(self) -> None:
        """End the iteration after the pass that is being made. Any thread, or a signal's handler, may call this."""
        self.interrupted = True

    def __iter__(self) -> Iterator[int]:
        """Make passes until every job has ended, yielding how many have been made since the run began.

        KeyboardInterrupt ends it after the pass that is being made, with `interrupted` set and the jobs not ended; a
        second one ends it at once.
        """
        with training(self.base.model, gradient_checkpointing=self.gradient_checkpointing), self._interruptible():
            while self.running and not self.interrupted:
                self._pass()
                self.passes += 1
                yield self.passes

    def finish(self) -> None:
        """End the jobs that an interrupt left running."""
        for job in self.running:
            self._end(job, "interrupted", "")

    def _pass(self) -> None:
        jobs, began = self.running, self.seconds
        units = {job: job.units() for job in jobs}
        for batch in self._batches(units):
            self._learn(batch, {job: job.objective.weight(units[job]) for job in jobs})
        for job in jobs:
            self._tell_of(job, partial(job.update, units[job], began, lambda: self.seconds))
        self.evaluate([job for job in jobs if job.running and job.due])
        for job in jobs:
            if job.running and (ending := job.ending()):
                self._end(job, *ending)

    def _batches(self, units: dict[Job, list[Unit]]) -> Iterator[list[Part]]:
        """Cut each job's units into pieces, the same whoever its neighbours are, and lay several jobs' together."""
        cut = [
            [Part(job, n, piece) for n, piece in enumerate(pieces(own, self.max_tokens))] for job, own in units.items()
        ]
        for parts in zip_longest(*cut):  # one piece of a job at a time: its dropout is seeded by the piece
            batch: list[Part] = []
            for part in filter(None, parts):
                tokens = sum(other.tokens for other in batch) + part.tokens
                # Padding would reach from one job into another's dropout masks.
                if batch and (tokens > self.max_tokens or not self._losses.packed):
                    yield batch
                    batch = []
                batch.append(part)
            yield batch

    def _learn(self, batch: Sequence[Part], weights: dict[Job, int]) -> None:
        """Add one batch's gradients to each job's own."""
        for part in batch:
            part.job.seed_dropout(part.piece)
        reference = self._reference(batch)
        with self._losses_of(batch) as losses:
            total = torch.zeros((), device=self.base.model.device)
            for part, own, base in zip(batch, losses, reference, strict=True):
                each, right = part.job.objective.losses(own, base)
                part.job.note(each, right)
                total = total + each.sum() / weights[part.job]
            total.backward()

    @torch.no_grad()
    def _reference(self, batch: Sequence[Part]) -> list[Tensor | None]:
        """Return the base's own losses of each part whose objective compares with them."""
        compared = [part for part in batch if part.job.objective.compares]
        if not compared:
            return [None] * len(batch)
        with self._losses_of(compared, base_only=True) as losses:
            own = iter(losses)
        return [next(own) if part.job.objective.compares else None for part in batch]

    @torch.no_grad()
    def evaluate(self, jobs: Sequence[Job]) -> None:
        """Find and tell the validation losses of some running jobs."""
        units = {job: job.valid_units() for job in jobs}
        sums, right = dict.fromkeys(jobs, 0.0), dict.fromkeys(jobs, 0)
        with evaluation(self.base.model):
            for batch in self._batches(units):
                reference = self._reference(batch)
                with self._losses_of(batch) as losses:
                    for part, own, base in zip(batch, losses, reference, strict=True):
                        each, hits = part.job.objective.losses(own, base)
                        sums[part.job] += float(each.sum())
                        right[part.job] += 0 if hits is None else int(hits.sum())
        for job in jobs:
            weight = job.objective.weight(units[job])
            self._tell_of(job, partial(job.evaluated, sums[job], right[job], weight, self.seconds))
        self._evaluated([job for job in jobs if job.running])

    @contextmanager
    def _losses_of(self, batch: Sequence[Part], *, base_only: bool = False) -> Iterator[tuple[Tensor, ...]]:
        """Yield the losses of each part's documents, each through its job's adapter; backward belongs inside."""
        documents = [document for part in batch for document in part.documents]
        names = [None if base_only else part.job.name for part in batch for _ in part.documents]
        lengths = [len(document.tokens) for document in documents] if self._losses.packed else None
        with self.bank.route(names, lengths=lengths), self._losses.of(documents) as losses:
            yield losses.split([len(part.documents) for part in batch])

    def _tell_of(self, job: Job, event: Callable[[], AnyEvent]) -> None:
        """Tell what a job did, or end it where it diverged."""
        try:
            done = event()
        except TrainingError as error:
            self._end(job, "diverged", str(error))
        else:
            self._tell(done)

    def _end(self, job: Job, reason: str, detail: str) -> None:
        self._tell(job.finish(reason, detail, self.seconds))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end the pass, and no gradient of an unfinished one remain."""
        mine = threading.current_thread() is threading.main_thread()

        def ask(*_: object) -> None:
            self.interrupt()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one means it

        before = signal.signal(signal.SIGINT, ask) if mine else None
        try:
            yield
        finally:
            if mine:
                signal.signal(signal.SIGINT, before)
            for job in self.jobs.values():
                job.optimizer.zero_grad()


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How the training of one adapter went."""

    losses: list[float]
    """Of each step: nats per supervised token, or DPO's loss per pair."""
    tokens: int
    """Read, none of them padding."""
    seconds: float
    end: End

    @property
    def steps(self) -> int:
        """Optimizer steps made."""
        return len(self.losses)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it early; the adapter is then the one after `steps` whole steps."""
        return self.end.reason == "interrupted"


def train(
    base: Base,
    bank: Bank,
    name: str,
    examples: Sequence[Example] | Sequence[Preference],
    config: TrainConfig,
    *,
    valid: Sequence[Example] | Sequence[Preference] = (),
    on_event: Listener | None = None,
) -> TrainResult:
    """Train the resident adapter `name` on examples: a Trainer with one job, to its end.

    The same seed, adapter and examples give bitwise the same adapter on the same machine.

    Raises:
        TrainingError: the loss or the gradient is NaN or infinite; the adapter is the best by validation loss, else
            the one before that step.
        DataError, ConfigError, UnknownAdapterError, AdapterError: see `Trainer.add`.
    """
    trainer = Trainer(base, bank, on_event=on_event)
    job = trainer.add(name, examples, config, valid=valid)
    try:
        for _ in trainer:
            pass
    except KeyboardInterrupt:  # a second Ctrl-C, or a listener's
        trainer.interrupt()
    trainer.finish()
    end = job.progress.end
    assert end is not None
    if end.reason == "diverged":
        message, _, hint = end.detail.partition("\n")
        raise TrainingError(message, hint=hint)
    return TrainResult(job.progress.losses, job.progress.tokens, trainer.seconds, end)
