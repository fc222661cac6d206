"""The training loop: any number of adapters in one pass over the base.

Each pass takes one optimizer step of every running job. Micro-batches of several jobs share a batch, each routed
through its own adapter, and the base is computed for all of them at once.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice, zip_longest

import torch
from torch import Tensor

from loradeck.base.load import Base
from loradeck.dataset.example import Example, Preference
from loradeck.dataset.token_file import Sizes
from loradeck.errors import ConfigError, DataError, TrainingError
from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.train.batching import share, split_units
from loradeck.train.classifier import check_kind, losses_of
from loradeck.train.config import PassConfig, TrainConfig
from loradeck.train.events import AnyEvent, End, EndReason, Listener
from loradeck.train.group import Group
from loradeck.train.job import Job, Sums
from loradeck.train.mode import evaluation, training
from loradeck.train.objective import Unit


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The units of one job's step that enter one batch; `index` counts the micro-batches of the step."""

    job: Job
    index: int
    units: Sequence[Unit]
    share: tuple[int, int, int] | None = None
    """Where other processes take the rest of it: as in `Dropout`."""

    @property
    def examples(self) -> list[Example]:
        return [example for unit in self.units for example in unit]

    @property
    def tokens(self) -> int:
        return sum(len(example.tokens) for example in self.examples)

    def of(self, group: Group, *, packed: bool) -> "MicroBatch":
        """Return this process's share; it may be empty."""
        if group.size == 1:
            return self
        here = share(self.units, group.rank, group.size)
        parts = [replace(self, units=units) for units in (self.units[: here.start], self.units[here])]
        before, rows, total = (each.tokens if packed else len(each.examples) for each in (*parts, self))
        return replace(parts[1], share=(before, rows, total))


class Trainer:
    """Jobs on one base. Iterate over it to train: `for _ in trainer` takes one pass at a time until all jobs ended.

    A job's losses and weights do not depend on the other jobs: not on their data, ranks or rates, nor on when they
    join, end or diverge. The base's weights are not changed.
    """

    def __init__(
        self,
        base: Base,
        bank: Bank,
        *,
        max_tokens: int = PassConfig.max_tokens,
        gradient_checkpointing: bool = False,
        group: Group | None = None,
        on_event: Listener | None = None,
        on_evaluated: Callable[[Sequence[Job]], None] | None = None,
    ) -> None:
        """Begin without jobs. A step of more than `max_tokens` is split into micro-batches, to the same gradient.

        The processes of a `group` divide each micro-batch, and must all do the same. Dropout of padded rows aside, the
        losses and weights are those of one process, within rounding.

        `on_evaluated` is called with the jobs of an evaluation, after their events and before any of them ends.
        """
        self.base, self.bank = base, bank
        self.max_tokens, self.gradient_checkpointing = max_tokens, gradient_checkpointing
        self.group = group or Group()
        self.jobs: dict[str, Job] = {}
        self.interrupted = False
        """Whether Ctrl-C, or `interrupt`, ended the iteration early."""
        self.passes = 0
        """Passes since the run began."""
        self.seconds_before = 0.0
        """Seconds that the run took before it was resumed."""
        self._emit: Listener = on_event or (lambda _: None)
        self._on_evaluated = on_evaluated or (lambda _: None)
        self._losses = losses_of(base)
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return self.seconds_before + time.perf_counter() - self._started

    @property
    def running(self) -> list[Job]:
        """The jobs that have not ended."""
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

        The reference of preference pairs is the adapter as it is now. Unless that is still the base, a frozen copy of
        it stays in the bank, as `name.reference`, until the job ends.

        Raises:
            DataError: there are no examples.
            ConfigError: an example is longer than the base's context, or for another task than the base's, or the
                adapter already has a job.
            UnknownAdapterError: there is no such adapter.
            AdapterError: the adapter is frozen.
        """
        if not train:
            raise DataError("there are no examples to train on", hint="Give at least one.")
        if name in self.jobs:
            raise ConfigError(f"{name!r} already has a job", hint="One job trains one adapter.")
        for examples in filter(None, (train, valid)):
            check_kind(examples[0], self.base.task)
        self.bank.parameters(name)
        job = Job(name, self.bank[name], train, config, self.base.model.config, task=self.base.task, valid=valid)
        check_context(self.base, train, valid)
        if job.objective.needs_reference and not _is_new(job.adapter):
            job.reference = f"{name}.reference"
            self.bank.add(job.reference, job.adapter.copy(trainable=False))
        self.jobs[name] = job
        return job

    def stop(self, name: str, detail: str) -> None:
        """End a job early; its adapter becomes the best by validation loss, else stays the last."""
        self._end(self.jobs[name], "stopped", detail)

    def interrupt(self) -> None:
        """End the iteration after the current pass. Any thread, or a signal handler, may call this."""
        self.interrupted = True

    def __iter__(self) -> Iterator[int]:
        """Take passes until every job has ended, yielding the number of passes since the run began.

        Ctrl-C ends the iteration after the current pass, with `interrupted` set and the jobs not ended; a second one
        raises KeyboardInterrupt at once.
        """
        with self._interruptible():
            while self.running and not self.interrupted:
                with training(self.base.model, gradient_checkpointing=self.gradient_checkpointing):
                    self._pass()
                self.interrupted = any(self.group.totals([self.interrupted]))  # each process must stop after this pass
                self.passes += 1
                yield self.passes

    def finish(self) -> None:
        """End the jobs that an interrupt left running."""
        for job in self.running:
            self._end(job, "interrupted", "")

    def _pass(self) -> None:
        """Take a step of each job, evaluate those that are due, and end those that are done.

        A job that was interrupted between its step and its evaluation or end goes on with these.
        """
        self._step([job for job in self.running if not (job.evaluation_due or job.end_reason())])
        self.evaluate([job for job in self.running if job.evaluation_due])
        for job in self.running:
            if reason := job.end_reason():
                self._end(job, *reason)

    def _step(self, jobs: Sequence[Job]) -> None:
        start = self.seconds
        units = {job: job.units() for job in jobs}
        counts = {job: job.objective.count(units[job]) for job in jobs}
        for batch in self._batches(units):
            self._backward(batch, counts)
        self.group.sum_gradients(parameter for job in jobs for parameter in job.adapter.parameters())
        for job, sums in zip(jobs, self._totals([job.sums for job in jobs]), strict=True):
            job.sums = sums
        for job in jobs:
            self._emit_or_end(job, partial(job.update, units[job], start, lambda: self.seconds))

    def _batches(self, units: Mapping[Job, Iterable[Unit]]) -> Iterator[list[MicroBatch]]:
        """Split each job's units into micro-batches, regardless of its neighbours, and batch those of several jobs.

        Of each batch, this process gets its share.
        """
        micro_batches = [
            map(partial(MicroBatch, job), count(), split_units(job_units, self.max_tokens))
            for job, job_units in units.items()
        ]
        # A batch has at most one micro-batch of a job: dropout is seeded by the micro-batch's index.
        for of_each_job in zip_longest(*micro_batches):
            batch: list[MicroBatch] = []
            for micro_batch in filter(None, of_each_job):
                tokens = sum(other.tokens for other in batch) + micro_batch.tokens
                # With padding, one job's lengths would change the shape of another's dropout masks.
                if batch and (tokens > self.max_tokens or not self._losses.packed):
                    yield from self._share(batch)
                    batch = []
                batch.append(micro_batch)
            yield from self._share(batch)

    def _share(self, batch: Sequence[MicroBatch]) -> Iterator[list[MicroBatch]]:
        shares = [micro_batch.of(self.group, packed=self._losses.packed) for micro_batch in batch]
        if not_empty := [micro_batch for micro_batch in shares if micro_batch.units]:
            yield not_empty

    def _totals(self, sums: Sequence[Sums]) -> list[Sums]:
        """Return the sums over all processes."""
        numbers = [each.numbers() for each in sums]
        totals = iter(self.group.totals([*chain(*numbers)]))
        return [Sums.of([*islice(totals, len(each))]) for each in numbers]

    def _backward(self, batch: Sequence[MicroBatch], counts: dict[Job, int]) -> None:
        """Add one batch's gradients to those of each job."""
        for micro_batch in batch:
            micro_batch.job.seed_dropout(micro_batch.index, micro_batch.share)
        references = self._reference_losses(batch)
        with self._example_losses(batch) as losses:
            total = torch.zeros((), device=self.base.model.device)
            for micro_batch, job_losses, reference in zip(batch, losses, references, strict=True):
                job = micro_batch.job
                outcome = job.objective.outcome(micro_batch.units, job_losses, reference)
                job.sums.add(outcome)
                total = total + outcome.losses.sum() / counts[job]
            total.backward()

    @torch.no_grad()
    def evaluate(self, jobs: Sequence[Job]) -> None:
        """Measure the validation losses of some running jobs and emit them."""
        sums, counts = {job: Sums() for job in jobs}, dict.fromkeys(jobs, 0)
        with evaluation(self.base.model):
            for batch in self._batches({job: job.valid_units() for job in jobs}):
                references = self._reference_losses(batch)
                with self._example_losses(batch) as losses:
                    for micro_batch, job_losses, reference in zip(batch, losses, references, strict=True):
                        job = micro_batch.job
                        sums[job].add(job.objective.outcome(micro_batch.units, job_losses, reference))
                        counts[job] += job.objective.count(micro_batch.units)
        totals = self._totals([*sums.values()])
        for job, total, units in zip(jobs, totals, self.group.totals([*counts.values()]), strict=True):
            self._emit_or_end(job, partial(job.record_evaluation, total, int(units), self.seconds))
        self._on_evaluated([job for job in jobs if job.running])

    @torch.no_grad()
    def _reference_losses(self, batch: Sequence[MicroBatch]) -> list[Tensor | None]:
        """Return the reference's losses for each micro-batch whose objective needs them, else None."""
        compared = [micro_batch for micro_batch in batch if micro_batch.job.objective.needs_reference]
        if not compared:
            return [None] * len(batch)
        with self._example_losses(compared, of_reference=True) as losses:
            references = iter(losses)
        return [next(references) if micro_batch.job.objective.needs_reference else None for micro_batch in batch]

    @contextmanager
    def _example_losses(
        self, batch: Sequence[MicroBatch], *, of_reference: bool = False
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the losses of each micro-batch's examples, through its job's adapter; backward belongs inside.

        `of_reference` yields those of the reference instead.
        """
        examples = [example for micro_batch in batch for example in micro_batch.examples]
        names = [
            micro_batch.job.reference if of_reference else micro_batch.job.name
            for micro_batch in batch
            for _ in micro_batch.examples
        ]
        if self._losses.packed:
            route = self.bank.route(names, lengths=[len(example.tokens) for example in examples])
        else:  # of one job: a module may compute once for all rows, as DeBERTa's relative positions
            route = self.bank.route(names[0])
        with route, self._losses.of(examples) as losses:
            yield losses.split([len(micro_batch.examples) for micro_batch in batch])

    def _emit_or_end(self, job: Job, action: Callable[[], AnyEvent]) -> None:
        """Emit the event that a job's action returns, or end the job if it diverged."""
        try:
            event = action()
        except TrainingError as error:
            self._end(job, "diverged", str(error))
        else:
            self._emit(event)

    def _end(self, job: Job, reason: EndReason, detail: str) -> None:
        if job.reference is not None:
            self.bank.unload(job.reference)
            job.reference = None
        self._emit(job.finish(reason, detail, self.seconds))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end the iteration after the pass, and drop the gradients of an unfinished pass."""
        in_main_thread = threading.current_thread() is threading.main_thread()

        def interrupt(*_: object) -> None:
            self.interrupt()
            if self.group.size == 1:  # else torchrun passes on the signal that the terminal has sent already
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C raises KeyboardInterrupt

        previous = signal.signal(signal.SIGINT, interrupt) if in_main_thread else None
        try:
            yield
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, previous)
            for job in self.jobs.values():
                job.discard()


def check_context(base: Base, *parts: Sequence[Example] | Sequence[Preference]) -> None:
    """Check that no example is longer than a base's context.

    Raises:
        ConfigError: one is.
    """
    longest = max(Sizes.of(examples).longest for examples in parts if examples)
    if base.context is not None and longest > base.context:
        raise ConfigError(
            f"the longest example has {longest} tokens; the context of {base.name} is {base.context}",
            hint=f"Set max_length to {base.context} or less.",
        )


def _is_new(adapter: Adapter) -> bool:
    """Whether an adapter does not change the base's output: A or B of every pair is zero, and it replaces no module."""
    return not adapter.saved and not any(bool(a.any()) and bool(b.any()) for a, b in map(adapter.pair, adapter.sites))


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The outcome of training one adapter."""

    losses: list[float]
    """Of each step: nats per supervised token or label, or the loss per preference pair."""
    tokens: int
    """Tokens read, without padding."""
    seconds: float
    end: End

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it early; the adapter is then the one after `steps` complete steps."""
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
    """Train the resident adapter `name` on examples, with a Trainer of one job.

    The same seed, adapter and examples give bitwise the same adapter on the same machine.

    Raises:
        TrainingError: the loss or the gradient is NaN or infinite; the adapter is the one with the lowest validation
            loss, else the one before that step.
        DataError, ConfigError, UnknownAdapterError, AdapterError: see `Trainer.add`.
    """
    trainer = Trainer(base, bank, on_event=on_event)
    job = trainer.add(name, examples, config, valid=valid)
    try:
        for _ in trainer:
            pass
    except KeyboardInterrupt:  # a second Ctrl-C, or one raised by a listener
        trainer.interrupt()
    trainer.finish()
    end = job.progress.end
    assert end is not None
    if end.reason == "diverged":
        message, _, hint = end.detail.partition("\n")
        raise TrainingError(message, hint=hint)
    return TrainResult(job.progress.losses, job.progress.tokens, trainer.seconds, end)
