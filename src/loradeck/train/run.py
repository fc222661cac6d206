"""A run: its folder on disk, and the training that fills it. Knows files and jobs; knows no screen and no gradients.

FOLDER/run.toml          all that is needed to do it again
FOLDER/metrics.jsonl     what happened, a line each (see train.events)
FOLDER/samples.jsonl     what the adapters answered at the evaluations
FOLDER/checkpoints/N/    the state after N passes
FOLDER/NAME/             each job's adapter once it ends: a PEFT folder; FOLDER itself where the only job has its name
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch

from loradeck.base.load import Base
from loradeck.base.text import chat_template_hash
from loradeck.dataset.example import UNSUPERVISED, Example, Preference
from loradeck.dataset.read import Dataset, held_out, read_dataset
from loradeck.disk import write_file
from loradeck.lora.bank import Bank
from loradeck.train import checkpoint, events
from loradeck.train.events import AnyEvent, End, Listener, Sample
from loradeck.train.history import METRICS, Track, read_history
from loradeck.train.job import Job
from loradeck.train.mode import evaluation
from loradeck.train.recipe import RUN_FILE, JobRecipe, RunRecipe
from loradeck.train.report import training_section
from loradeck.train.trainer import Trainer

SAMPLES, CHECKPOINTS = "samples.jsonl", "checkpoints"

# Adapters' names and prompts' tokens, one of each per row -> their answers.
Answer: TypeAlias = Callable[[Sequence[str], Sequence[list[int]]], list[str]]


@dataclass(frozen=True, slots=True)
class Split:
    """A job's examples."""

    dataset: Dataset
    train: list[Example] | list[Preference]
    valid: list[Example] | list[Preference]


class Run:
    """The jobs of a recipe on a base, in a folder.

    Raises:
        DataError: a dataset cannot be trained on.
        ConfigError, TargetError, AdapterNameError: a job that cannot be on this base.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        folder: Path,
        base: Base,
        *,
        answer: Answer | None = None,
        on_event: Listener | None = None,
    ) -> None:
        """Read the datasets and make the adapters; nothing is written before `train`."""
        self.folder, self.base, self.bank = folder, base, Bank(base.model)
        self.answer, self.on_event = answer, on_event or (lambda _: None)
        self.trainer = Trainer(
            base,
            self.bank,
            max_tokens=recipe.shared.max_tokens,
            gradient_checkpointing=recipe.shared.gradient_checkpointing,
            on_event=self._note,
            on_evaluated=self._sample,
        )

        @cache
        def read(source: str, max_length: int) -> Dataset:
            return read_dataset(source, base.tokenizer, max_length)

        self.splits: dict[str, Split] = {}
        layers = base.model.config.get_text_config().num_hidden_layers
        jobs = []
        for job in recipe.jobs:
            config = job.train
            split = self.splits[job.name] = _split(job, read)
            generator = torch.Generator().manual_seed(config.seed)
            self.bank.add(job.name, job.adapter_config(layers), generator=generator)
            added = self.trainer.add(job.name, split.train, config, valid=split.valid)
            resolved = replace(config, learning_rate=added.schedule.peak, eval_every=added.eval_every)
            jobs.append(replace(job, train=resolved))
        self.recipe = replace(recipe, jobs=tuple(jobs))
        """With every default made plain."""

    def place(self, name: str) -> Path:
        """Return the folder of a job's adapter."""
        alone = len(self.recipe.jobs) == 1 and name == self.folder.resolve().name
        return self.folder if alone else self.folder / name

    def begin(self) -> None:
        """Write a new run's folder; what an older run left in it is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        for name in (METRICS, SAMPLES):
            write_file(self.folder / name, b"")
        write_file(self.folder / RUN_FILE, self.recipe.toml().encode())

    def resume(self) -> int:
        """Go back to the newest checkpoint, or to the start where there is none yet; return the passes it had made.

        Raises:
            TrainingError: the base or a dataset is not the run's, or the checkpoint is damaged.
        """
        found = checkpoint.checkpoints(self.folder / CHECKPOINTS)
        if not found:
            self.begin()
            return 0
        state = checkpoint.read(found[-1])
        checkpoint.restore(self.trainer, found[-1], state, data=self._data())
        for name, size in state.files.items():  # what came after is about to happen again
            path = self.folder / name
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)
        return state.passes

    def train(self, each_pass: Callable[[Trainer], None] | None = None) -> None:
        """Train all jobs to their ends, with checkpoints; `each_pass` may stop jobs.

        Ctrl-C ends it after the pass that is being made, with a checkpoint, and with the adapters as they are then.
        """
        for passes in self.trainer:
            if each_pass:
                each_pass(self.trainer)
            if passes % self.recipe.shared.checkpoint_every == 0 and self.trainer.running:
                self._checkpoint()
        self._checkpoint()
        self.trainer.finish()

    def _checkpoint(self) -> None:
        paths = {name: self.folder / name for name in (METRICS, SAMPLES)}
        checkpoint.save(
            self.trainer,
            self.folder / CHECKPOINTS,
            data=self._data(),
            files={name: path.stat().st_size for name, path in paths.items() if path.exists()},
            keep=self.recipe.shared.keep_checkpoints,
        )

    def _data(self) -> dict[str, str]:
        return {name: split.dataset.sha256 for name, split in self.splits.items()}

    def _note(self, event: AnyEvent) -> None:
        """Write an event down, act on it, and pass it on."""
        with (self.folder / (SAMPLES if isinstance(event, Sample) else METRICS)).open("ab") as file:
            file.write(events.encode(event))
        if isinstance(event, End):
            self.publish(event.job, self.place(event.job))
        self.on_event(event)

    def publish(self, name: str, place: Path) -> None:
        """Save an ended job's adapter, unless it has learned nothing, or diverged before any of it was found good."""
        job = self.trainer.jobs[name]
        end = job.progress.end
        if end is None or not end.kept or (end.reason == "diverged" and job.progress.best_loss is None):
            return
        track = read_history(self.folder).get(name, Track())
        split = self.splits[job.name]
        notes = training_section(
            base=job.adapter.origin.base_model or self.base.name,
            source=self.base.name,
            data={
                "dataset": Path(split.dataset.name).name,  # not where it lies on this machine
                "form": split.dataset.form,
                "examples": f"{len(split.train):,} to learn from, {len(split.valid):,} to validate on",
                "sha256": split.dataset.sha256[:16],
            },
            lora=job.adapter.config,
            recipe=job.config,
            steps=track.steps,
            evaluations=track.evaluations,
            end=end,
        )
        job.adapter.describe(
            data_sha256=split.dataset.sha256,
            chat_template_sha256=chat_template_hash(self.base.tokenizer) or "none",
            steps=str(end.kept),
        )
        job.adapter.save(place, notes=notes)

    def _sample(self, jobs: Sequence[Job]) -> None:
        """Let the adapters that were just evaluated answer their first validation prompts, all in one batch."""
        rows = [
            (job, *_prompt_and_answer(example))
            for job in jobs
            for example in self.splits[job.name].valid[: self.recipe.shared.samples]
        ]
        if not rows or self.answer is None:
            return
        with evaluation(self.base.model):
            answers = self.answer([job.name for job, _, _ in rows], [prompt for _, prompt, _ in rows])
        for (job, prompt, expected), answer in zip(rows, answers, strict=True):
            self._note(
                Sample(
                    job=job.name,
                    step=job.progress.step,
                    seconds=self.trainer.seconds,
                    prompt=self._text(prompt),
                    expected=self._text(expected),
                    answer=answer,
                )
            )

    def _text(self, tokens: list[int]) -> str:
        return str(self.base.tokenizer.decode(tokens, skip_special_tokens=True))


def _split(job: JobRecipe, read: Callable[[str, int], Dataset]) -> Split:
    dataset = read(job.data, job.train.max_length)
    train, valid = dataset.train, dataset.valid
    if job.valid is not None:
        other = read(job.valid, job.train.max_length)
        valid = other.valid or other.train
    elif not valid and job.train.valid_ratio:
        train, valid = held_out(train, job.train.valid_ratio, job.train.seed)
    return Split(dataset, train, valid)


def _prompt_and_answer(example: Example | Preference) -> tuple[list[int], list[int]]:
    """Return what comes before the first learned token, and the learned tokens that follow it."""
    document = example.chosen if isinstance(example, Preference) else example
    begin = next(n for n, label in enumerate(document.labels) if n and label != UNSUPERVISED)
    rest = document.labels[begin:]
    length = next((n for n, label in enumerate(rest) if label == UNSUPERVISED), len(rest))
    return document.tokens[:begin], rest[:length]
