"""A run: the jobs of a recipe, and the folder they are trained into.

FOLDER/run.toml          the recipe, to repeat the run
FOLDER/metrics.jsonl     the events, one a line (see train.events)
FOLDER/samples.jsonl     the adapters' answers at the evaluations
FOLDER/checkpoints/N/    the state after N passes
FOLDER/NAME/             each job's adapter once it ends, a PEFT folder; FOLDER itself if the only job has its name
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import msgspec
import torch

from loradeck.base.load import Base
from loradeck.base.text import chat_template_hash
from loradeck.dataset.example import UNSUPERVISED, Example, Preference
from loradeck.dataset.source import Position
from loradeck.disk import write_file
from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.lora.init import stamp
from loradeck.lora.peft import Origin
from loradeck.stored import digest_of, files_of
from loradeck.tokenizer_files import TokenizerFiles
from loradeck.train import checkpoint, events
from loradeck.train.events import AnyEvent, End, Listener, Sample
from loradeck.train.group import Group
from loradeck.train.history import METRICS, JobHistory, read_history
from loradeck.train.inputs import parent_name, read_parent, with_parents
from loradeck.train.job import Job
from loradeck.train.job_data import JobData, read_data
from loradeck.train.mode import evaluation
from loradeck.train.model_card import training_section
from loradeck.train.recipe import RUN_FILE, JobRecipe, RunRecipe
from loradeck.train.trainer import Trainer

SAMPLES, CHECKPOINTS = "samples.jsonl", "checkpoints"

FELL = 0.9  # of its first value: then a loss has fallen

# Answers prompts: (adapter names, or None for the base, and prompt tokens), one of each per row -> texts.
Answer: TypeAlias = Callable[[Sequence[str | None], Sequence[list[int]]], list[str]]


class Run:
    """The jobs of a recipe on a base, in a folder.

    Raises:
        DataError: a dataset cannot be trained on.
        ConfigError, TargetError, AdapterNameError: a job is invalid on this base.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        folder: Path,
        base: Base,
        *,
        bank: Bank | None = None,
        data: Mapping[str, JobData] | None = None,
        answer: Answer | None = None,
        group: Group | None = None,
        on_event: Listener | None = None,
        on_read: Callable[[Position], None] | None = None,
    ) -> None:
        """Read the datasets, with a call of `on_read` after each record, and create the adapters.

        With a `bank`, the run shares it with others; the names of its jobs are new there. With `data`, the datasets
        are read already. Nothing is written into the folder before `begin` or `resume`. Of the processes of a `group`,
        which all run it, the first writes.
        """
        recipe = with_parents(recipe)
        self.folder, self.base, self.bank = folder, base, Bank(base.model) if bank is None else bank
        self.answer, self.on_event = answer, on_event or (lambda _: None)
        self.trainer = Trainer(
            base,
            self.bank,
            max_tokens=recipe.shared.max_tokens,
            gradient_checkpointing=recipe.shared.gradient_checkpointing,
            group=group,
            on_event=self._record,
            on_evaluated=self._sample,
        )
        self.data = read_data(recipe.jobs, base, self.bank, on_read) if data is None else data
        self.parents: dict[str, str] = {}
        """The sha256 of the adapter that a job goes on from."""
        layers = base.model.config.get_text_config().num_hidden_layers
        jobs = []
        for job_recipe in recipe.jobs:
            name, config = job_recipe.name, job_recipe.train
            examples = self.data[name]
            if job_recipe.from_ is None:
                generator = torch.Generator().manual_seed(config.seed)
                outputs = {"generate": None, "reward": 1}.get(base.task, len(examples.dataset.labels))
                self.bank.add(name, job_recipe.adapter_config(layers), num_labels=outputs, generator=generator)
            else:
                job_recipe = replace(job_recipe, lora=self._load_parent(job_recipe))
            if examples.dataset.labels:
                self.bank[name].describe(labels=msgspec.json.encode(examples.dataset.labels).decode())
            job = self.trainer.add(name, examples.train, config, valid=examples.valid)
            resolved = replace(config, learning_rate=job.schedule.peak, eval_every=job.eval_every)
            jobs.append(replace(job_recipe, train=resolved))
        self.recipe = replace(recipe, jobs=tuple(jobs))
        """With every default filled in."""

    def _load_parent(self, job: JobRecipe) -> LoraConfig:
        """Load the adapter that a job goes on from, record it, and return its config."""
        assert job.from_ is not None
        files = read_parent(job)
        self.bank.load(files.folder, job.name, trainable=True)
        self.parents[job.name] = digest_of(files.folder, files_of(files))
        adapter = self.bank[job.name]
        # What the parent's metadata says of its training is not true of this adapter.
        adapter.origin = replace(adapter.origin, metadata=Origin().metadata, written=None)
        if not adapter.added_tokens:
            adapter.tokenizer_files = TokenizerFiles()  # the examples are encoded by the base's
        stamp(self.base.model, adapter)
        adapter.describe(parent=parent_name(files.folder), parent_sha256=self.parents[job.name])
        return adapter.config

    def adapter_folder(self, name: str) -> Path:
        """Return the folder of a job's adapter."""
        alone = len(self.recipe.jobs) == 1 and name == self.folder.resolve().name
        return self.folder if alone else self.folder / name

    def begin(self) -> None:
        """Create a new run's folder; the files of an older run in it are removed."""
        self._check_same()
        if not self._writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        for name in (METRICS, SAMPLES):
            write_file(self.folder / name, b"")
        write_file(self.folder / RUN_FILE, self.recipe.toml().encode())

    def resume(self) -> int:
        """Restore the newest checkpoint, or begin anew if there is none; return the number of passes restored.

        A job that is finished goes on if the recipe now has more steps for it: with its optimizer's state, the next
        examples, and the learning rates that the schedule of the new total has from this step on.

        Raises:
            TrainingError: the base or a dataset has changed, or the checkpoint is damaged.
        """
        paths = checkpoint.checkpoints(self.folder / CHECKPOINTS)
        if not paths:
            self.begin()
            return 0
        state = checkpoint.read(paths[-1])
        checkpoint.restore(self.trainer, paths[-1], state, data=self._data_hashes(), parents=self.parents)
        self._check_same()  # no process has still to read what is changed now
        if not self._writes:
            return state.passes
        for name, size in state.files.items():  # what was written later is about to be written again
            path = self.folder / name
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)
        write_file(self.folder / RUN_FILE, self.recipe.toml().encode())
        return state.passes

    def train(self, each_pass: Callable[[Trainer], None] | None = None) -> None:
        """Train all jobs to their ends, with checkpoints; `each_pass` may stop jobs.

        Ctrl-C ends the run after the current pass, with a checkpoint, and saves the adapters as they are then.
        """
        for passes in self.trainer:
            if each_pass:
                each_pass(self.trainer)
            if passes % self.recipe.shared.checkpoint_every == 0 and self.trainer.running:
                self.checkpoint()
        self.checkpoint()
        self.trainer.finish()

    def checkpoint(self) -> None:
        """Write a checkpoint; between two passes."""
        if not self._writes:
            return
        paths = {name: self.folder / name for name in (METRICS, SAMPLES)}
        checkpoint.save(
            self.trainer,
            self.folder / CHECKPOINTS,
            data=self._data_hashes(),
            parents=self.parents,
            files={name: path.stat().st_size for name, path in paths.items() if path.exists()},
            keep=self.recipe.shared.keep_checkpoints,
        )

    @property
    def _writes(self) -> bool:
        return self.trainer.group.rank == 0

    def _check_same(self) -> None:
        """Check that all processes are about to train the same adapters on the same data."""
        self.trainer.group.check_same(
            lambda: {
                "the base": self.base.fingerprint,
                **{f"the dataset of {name}": sha256 for name, sha256 in self._data_hashes().items()},
                **{f"the adapter {name}": _digest(job.adapter) for name, job in self.trainer.jobs.items()},
                "passes": self.trainer.passes,
            }
        )

    def _data_hashes(self) -> dict[str, str]:
        return {name: data.dataset.sha256 for name, data in self.data.items()}

    def _record(self, event: AnyEvent) -> None:
        """Write an event to its file, save the adapter of a job that ended, and pass the event on."""
        if isinstance(event, End) and event.reason in ("finished", "early stop"):
            event = self._noted(event)
        if self._writes:
            with (self.folder / (SAMPLES if isinstance(event, Sample) else METRICS)).open("ab") as file:
                file.write(events.encode(event))
        if isinstance(event, End):
            self.save(event.job, self.adapter_folder(event.job))
        self.on_event(event)

    def save(self, name: str, folder: Path) -> None:
        """Save the adapter of a job that ended, unless it took no step, or diverged without a validation loss."""
        job = self.trainer.jobs[name]
        end = job.progress.end
        if end is None or not end.kept or (end.reason == "diverged" and job.progress.best_loss is None):
            return
        if not self._writes:
            return
        history = read_history(self.folder).get(name, JobHistory())
        data = self.data[name]
        parent = next(each.from_ for each in self.recipe.jobs if each.name == name)
        notes = training_section(
            base=job.adapter.origin.base_model or self.base.name,
            source=self.base.name,
            data={
                "dataset": Path(data.dataset.name).name,  # without its path on this machine
                "form": data.dataset.form,
                "examples": f"{len(data.train):,} to train on, {len(data.valid):,} to validate on",
                "sha256": data.dataset.sha256[:16],
            },
            parent=parent and parent_name(Path(parent)),
            lora=job.adapter.config,
            recipe=job.config,
            task=self.base.task,
            labels=data.dataset.labels,
            steps=history.steps,
            evaluations=history.evaluations,
            end=end,
        )
        job.adapter.describe(
            dataset=Path(data.dataset.name).name,
            data_sha256=data.dataset.sha256,
            chat_template_sha256=chat_template_hash(data.tokenizer) or "none",
            **_results(job, history),
        )
        job.adapter.save(folder, notes=notes)

    def _sample(self, jobs: Sequence[Job]) -> None:
        """Let the adapters that were just evaluated answer their first validation prompts, in one batch."""
        rows = [
            (job, *_prompt_and_answer(example))
            for job in jobs
            for example in self.data[job.name].valid[: self.recipe.shared.samples]
        ]
        if not rows or self.answer is None:
            return
        with evaluation(self.base.model):
            answers = self.answer([job.name for job, _, _ in rows], [prompt for _, prompt, _ in rows])
        for (job, prompt, expected), answer in zip(rows, answers, strict=True):
            self._record(
                Sample(
                    job=job.name,
                    step=job.progress.step,
                    seconds=self.trainer.seconds,
                    prompt=self._text(job.name, prompt),
                    expected=self._text(job.name, expected),
                    answer=answer,
                )
            )

    def _noted(self, end: End) -> End:
        """Return a job's end with a note if its loss fell, but its answers are still the base's."""
        job = self.trainer.jobs[end.job]
        first, last = job.progress.losses[0], job.progress.losses[-1]
        examples = (self.data[end.job].valid or self.data[end.job].train)[: self.recipe.shared.samples]
        if last > FELL * first or not examples or self.answer is None or job.adapter.added_tokens:
            return end  # what an adapter with tokens of its own reads, the base may not know
        prompts = [_prompt_and_answer(example)[0] for example in examples]
        names = [name for name in (end.job, None) for _ in prompts]
        with evaluation(self.base.model), torch.no_grad():
            answers = self.answer(names, prompts * 2)
        if answers[: len(prompts)] != answers[len(prompts) :]:
            return end
        note = (
            f"the loss fell from {first:.3f} to {last:.3f}, but the answers to {len(prompts)} sample prompts are still "
            "the base's; try a higher learning rate, or more epochs"
        )
        job.progress.end = msgspec.structs.replace(end, detail="; ".join(filter(None, (end.detail, note))))
        return job.progress.end

    def _text(self, name: str, tokens: list[int]) -> str:
        return str(self.data[name].tokenizer.decode(tokens, skip_special_tokens=True))


def _digest(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    for key, tensor in adapter.tensors():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _results(job: Job, history: JobHistory) -> dict[str, str]:
    """Return how a job went, for the metadata of its adapter; without times, so that equal runs give equal files."""
    progress = job.progress
    assert progress.end is not None
    kept = progress.end.kept
    evaluation = next((each for each in reversed(history.evaluations) if each.step == kept), None)
    judged = evaluation or next((each for each in reversed(history.steps) if each.step == kept), None)
    numbers = {
        "loss": progress.losses[-1],
        "validation_loss": evaluation and evaluation.loss,
        "accuracy": judged and judged.accuracy,
        "margin": judged and judged.margin,
    }
    return {
        "objective": job.objective.name,
        "steps": f"{kept}",
        "tokens": f"{progress.tokens}",
        **{name: f"{number:.4f}" for name, number in numbers.items() if number is not None},
    }


def _prompt_and_answer(example: Example | Preference) -> tuple[list[int], list[int]]:
    """Return the tokens before the first supervised token, and the supervised tokens from there."""
    example = example.chosen if isinstance(example, Preference) else example
    start = next(n for n, label in enumerate(example.labels) if n and label != UNSUPERVISED)
    rest = example.labels[start:]
    length = next((n for n, label in enumerate(rest) if label == UNSUPERVISED), len(rest))
    return example.tokens[:start], rest[:length]
