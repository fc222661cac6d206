"""An engine on the tiny base that trains, and jobs for it."""

import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loradeck import AdapterStore, Base
from loradeck.live.config import LiveConfig
from loradeck.live.live_job import LiveJob
from loradeck.live.live_training import LiveTraining
from loradeck.live.records import JobRecord, JobRequest
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.train.config import PassConfig
from loradeck.train.job import Job
from loradeck.train.recipe import RunRecipe, job_recipe
from loradeck.train.run import Run


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """Every test here computes on one thread."""


SETTINGS: dict[str, Any] = {"r": 4, "learning_rate": 3e-3, "batch_size": 3, "epochs": 2, "lora_dropout": 0.2}


def lines(words: str, count: int = 17) -> bytes:
    """A dataset of prompts and completions."""
    rows = [{"prompt": f"{n}?", "completion": f"{words} {n * n}" + "!" * (n % 5)} for n in range(count)]
    return "\n".join(map(json.dumps, rows)).encode()


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, for two minutes."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "not within two minutes"
        time.sleep(0.002)


class Live:
    """An engine with its training, in a folder; it can be closed and opened again."""

    def __init__(self, base: Base, folder: Path, **config: Any) -> None:
        self.base, self.folder = base, folder
        self.config = LiveConfig(**{"checkpoint_every": 3, "train_tokens": 100, **config})
        self.open()

    def open(self) -> None:
        self.store = AdapterStore(self.folder / "store")
        self.store.folder.mkdir(parents=True, exist_ok=True)
        self.engine = Engine(self.base, self.store, EngineConfig(max_rows=4, max_step_tokens=16))
        self.training = LiveTraining(self.engine, self.folder / "live", self.config)

    def close(self) -> None:
        self.training.close()
        self.engine.close()

    def upload(self, content: bytes, filename: str = "train.jsonl", owner: str = "") -> str:
        with self.training.uploads.upload(owner, filename, "fine-tune") as upload:
            upload.write(content)
        return upload.record.id

    def create(self, data: bytes, owner: str = "", valid: bytes | None = None, **request: Any) -> JobRecord:
        """Upload a dataset and create a job."""
        settings = {**SETTINGS, **request.pop("settings", {})}
        given = {
            "owner": owner,
            "model": self.base.name,
            "training_file": self.upload(data, owner=owner),
            "validation_file": valid and self.upload(valid, "valid.jsonl", owner),
            **request,
        }
        return self.training.create(JobRequest(**given, settings=settings))

    def job(self, record: JobRecord) -> JobRecord:
        return self.training.jobs.get(record.id, record.request.owner)

    def end(self, record: JobRecord) -> JobRecord:
        """Wait for a job's end, and return it."""
        until(lambda: self.job(record).ended)
        return self.job(record)

    def trains(self, record: JobRecord, step: int = 1) -> None:
        """Wait until a job has taken a step."""
        until(lambda: self.job(record).steps >= step or self.job(record).ended)

    def messages(self, record: JobRecord) -> list[str]:
        events, _ = self.training.jobs.events(record.id, limit=10_000, order="asc")
        return [event.message for event in events if event.type == "message"]

    def adapter(self, record: JobRecord) -> bytes:
        """The tensors that a job published."""
        assert record.adapter is not None, record.error
        return (self.store.find(record.adapter).path / "adapter_model.safetensors").read_bytes()


class Gate:
    """Holds the engine's thread after a pass of a job, until it is opened, or training is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, live: Live) -> None:
        self.live, self.step = live, 0
        self.reached = False
        self._after_pass = LiveJob._after_pass
        monkeypatch.setattr(LiveJob, "_after_pass", lambda *given: self._hold(*given))

    def at(self, step: int) -> None:
        """Hold the next job that has taken this many steps."""
        self.step, self.reached = step, False

    def wait(self) -> None:
        """Wait until a job is held."""
        until(lambda: self.reached)

    def open(self) -> None:
        self.step = 0

    def _hold(self, live_job: LiveJob, run: Run, job: Job) -> None:
        if job.progress.step == self.step:
            self.reached = True
            until(lambda: job.progress.step != self.step or self.live.training._closed)
        self._after_pass(live_job, run, job)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, live: Live) -> Gate:
    return Gate(monkeypatch, live)


@pytest.fixture
def live(base: Base, tmp_path: Path) -> Iterator[Live]:
    live = Live(base, tmp_path)
    yield live
    live.close()


@pytest.fixture
def alone(make: Callable[[str], Base], base: Base, tmp_path: Path) -> Callable[..., bytes]:
    """Return a function that trains a job as `loradeck train` does, on a base of its own, and returns its tensors."""

    def train(data: bytes, valid: bytes | None = None, parent: Path | None = None, **settings: Any) -> bytes:
        folder = tmp_path / f"alone-{len([*tmp_path.iterdir()])}"
        folder.mkdir()
        for name, content in {"train": data, "valid": valid}.items():
            if content is not None:
                (folder / f"{name}.jsonl").write_bytes(content)
        job = job_recipe(
            {**SETTINGS, **settings},
            "job",
            name="adapter",
            data=str(folder / "train.jsonl"),
            valid=None if valid is None else str(folder / "valid.jsonl"),
            **{"from": parent and str(parent)},
        )
        shared = PassConfig(max_tokens=100, samples=0)
        own = replace(base, model=fresh(base))
        run = Run(RunRecipe(base="tiny", shared=shared, jobs=(job,)), folder / "run", own)
        run.begin()
        run.train()
        return (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()

    return train


def fresh(base: Base) -> Any:
    """A copy of a base's model that no engine knows; training sets its attention in the config, so it has its own."""
    model = type(base.model)(deepcopy(base.model.config)).eval().requires_grad_(False)
    model.load_state_dict(base.model.state_dict())
    return model
