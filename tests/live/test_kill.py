"""A server that is killed at any moment goes on with its jobs by itself, to the same bits, each published once.

LORADECK_KILLS=50 pytest tests/live/test_kill.py kills more often.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.live.conftest import lines

from loradeck.live.database import Database
from loradeck.live.job_store import JobStore
from loradeck.live.uploads import Uploads
from loradeck.store import AdapterStore
from loradeck.train import checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("LORADECK_KILLS", "3"))

# For each line it reads, forks a server that creates the jobs that are not there yet, waits for all to end, and prints
# its exit code and how often it asked the system for something in its folders, or the database to begin or commit. With
# `at`, it sends itself a signal the at-th time. Torch is imported once.
SERVERS = """
import json, os, signal, sys, threading, time, torch
from pathlib import Path
torch.set_num_threads(1)
import loradeck.live.live_training as live
from loradeck import AdapterStore, Base
from loradeck.live.config import LiveConfig
from loradeck.live.database import Database
from loradeck.live.records import JobRequest
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
import transformers.models.llama.modeling_llama

def serve(folder, requests, ended):
    engine = Engine(Base.load(folder / "tiny"), AdapterStore(folder / "store"), EngineConfig(max_rows=2))
    training = live.LiveTraining(engine, folder / "live", LiveConfig(checkpoint_every=3, train_tokens=100))
    there = {job.request.suffix for job in training.jobs.list("")[0]}
    for request in requests:
        if request["suffix"] in there:
            continue
        for kind in ("training_file", "validation_file"):
            if kind in request:
                with training.uploads.upload("", request[kind], "fine-tune") as upload:
                    upload.write((folder / request[kind]).read_bytes())
                request[kind] = upload.record.id
        job = training.create(JobRequest(model=engine.base.name, **request))
        with (folder / "created.txt").open("a") as file:
            file.write(job.id + "\\n")
    while training.jobs.pending() and not ended.is_set():
        time.sleep(0.002)
    training.close()
    engine.close()

for line in sys.stdin:
    folder, requests, at, number = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(folder + "/log.txt", "a")
        count, lock, ended = 0, threading.RLock(), threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        def tick():
            global count
            with lock:
                count += 1
                if count == at:
                    os.kill(os.getpid(), number)
        def watch(event, given):
            if event != "open" and not event.startswith(("os.", "shutil.")):
                return
            texts = [os.fsdecode(each) for each in given if isinstance(each, (str, bytes, os.PathLike))]
            if any(f"{folder}/{name}" in text for text in texts for name in ("live", "store")):
                tick()
        transaction = Database.transaction
        def counted(*given, **named):
            tick()
            yielded = transaction(*given, **named)
            return Counted(yielded)
        class Counted:
            def __init__(self, inner): self.inner = inner
            def __enter__(self): return self.inner.__enter__()
            def __exit__(self, *given):
                tick()
                result = self.inner.__exit__(*given)
                tick()
                return result
        Database.transaction = counted
        sys.addaudithook(watch)
        code = 0
        try:
            serve(Path(folder), requests, ended)
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os.write(write, str(count).encode())
        os._exit(code)
    os.close(write)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, os.read(read, 20).decode() or 0, flush=True)
    os.close(read)
"""

REQUESTS: list[dict[str, Any]] = [
    {
        "suffix": "one",
        "training_file": "one.jsonl",
        "validation_file": "contrary.jsonl",
        "settings": {
            "r": 4,
            "lora_dropout": 0.2,
            "learning_rate": 3e-3,
            "batch_size": 3,
            "epochs": 4,
            "eval_every": 3,
        },
    },
    {
        "suffix": "two",
        "training_file": "two.jsonl",
        "seed": 5,
        "settings": {"r": 2, "target_modules": ["q_proj", "down_proj"], "batch_size": 2, "max_steps": 13},
    },
    {"suffix": "three", "method": "dpo", "training_file": "pairs.jsonl", "settings": {"r": 2, "epochs": 2}},
]
PAIRS = "\n".join(json.dumps({"prompt": f"{n}?", "chosen": f"ahoy {n}", "rejected": "no"}) for n in range(9))
FILES = {
    "one.jsonl": lines("ahoy matey"),
    "two.jsonl": lines("yes indeed"),
    "contrary.jsonl": lines("QUITE WRONG", 5),
    "pairs.jsonl": PAIRS.encode(),
}


@dataclass
class Done:
    """How a server ended, and how often it asked for something."""

    code: int
    accesses: int


Serve = Callable[..., Done]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield process


@pytest.fixture
def serve(tmp_path: Path, tiny_folder: Path, server: subprocess.Popen[str]) -> Serve:
    """Serve in a folder, in a process of its own that may send itself a signal."""

    def run(name: str, *, at: int | None = None, number: int = signal.SIGKILL) -> Done:
        folder = tmp_path / name
        if not folder.exists():
            folder.mkdir()
            (folder / "store").mkdir()
            (folder / "created.txt").touch()
            (folder / "tiny").symlink_to(tiny_folder)
            for file, content in FILES.items():
                (folder / file).write_bytes(content)
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps([str(folder), REQUESTS, at, number]), file=server.stdin, flush=True)
        return Done(*map(int, server.stdout.readline().split()))

    return run


@dataclass
class Whole:
    """What a server left that was never interrupted."""

    outcome: dict[str, Any]
    accesses: int


@pytest.fixture(scope="module")
def cache() -> list[Whole]:
    return []


@pytest.fixture
def whole(tmp_path: Path, serve: Serve, cache: list[Whole]) -> Whole:
    if not cache:
        done = serve("whole")
        assert done.code == 0, (tmp_path / "whole" / "log.txt").read_text()
        cache.append(Whole(outcome(tmp_path / "whole"), done.accesses))
    return cache[0]


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that a server leaves of its jobs, except ids and times; nothing else may be left."""
    database = Database(folder / "live" / "live.sqlite")
    uploads, jobs, store = (
        Uploads(database, folder / "live" / "files"),
        JobStore(database),
        AdapterStore(folder / "store"),
    )
    try:
        left: dict[str, Any] = {"names": store.names()}
        records, _ = jobs.list("")
        files, _ = uploads.list("")
        assert len([file for file in files if file.purpose == "fine-tune-results"]) == len(records)
        assert {path.name for path in (folder / "live" / "files").iterdir()} == {file.id for file in files}
        assert {path.name for path in (folder / "live" / "jobs").iterdir()} == {record.id for record in records}
        for record in records:
            path = folder / "live" / "jobs" / record.id
            events, _ = jobs.events(record.id, limit=10_000, order="asc")
            checkpoints, _ = jobs.checkpoints(record.id)
            metrics = [event for event in events if event.type == "metrics"]
            untimed = [{k: v for k, v in event.data.items() if k != "tokens_per_second"} for event in metrics]
            left[record.name] = {
                "status": record.status,
                "adapter": record.adapter == f"{record.name}@{store.versions(record.name)[0]}",
                "steps": (record.steps, record.total_steps, record.trained_tokens),
                "versions": len(store.versions(record.name)),  # a kill may have used up a number
                "tensors": (store.find(record.name).path / "adapter_model.safetensors").read_bytes(),
                "files": sorted(each.name for each in path.iterdir()),
                "models": {each.name: (each / "adapter_model.safetensors").read_bytes() for each in models(path)},
                "checkpoints": [(each.step, each.metrics) for each in checkpoints],
                "metrics": untimed,
                "messages": [event.message.partition("@")[0] for event in events[-2:]],
                "results": [uploads.path(file).read_bytes() for file in record.result_files],
            }
        versions = {f"{record.name}@{number}" for record in records for number in store.versions(record.name)}
        assert {path.name for path in store.folder.iterdir()} == {".versions", *versions}
        return left
    finally:
        database.close()


def models(path: Path) -> list[Path]:
    return sorted((path / "models").iterdir())


def test_killed_at_random_moments_it_ends_the_same(tmp_path: Path, serve: Serve, whole: Whole) -> None:
    assert {whole.outcome[name]["status"] for name in ("one", "two", "three")} == {"succeeded"}
    rng = random.Random(os.environ.get("LORADECK_SEED", "0"))
    for number in range(KILLS):
        name = f"killed-{number}"
        kills = [rng.randrange(1, whole.accesses) for _ in range(rng.randrange(1, 4))]
        codes = [serve(name, at=at).code for at in kills]
        assert {*codes} <= {-signal.SIGKILL, 0}, (tmp_path / name / "log.txt").read_text()
        created = (tmp_path / name / "created.txt").read_text().split()
        assert serve(name).code == 0, (tmp_path / name / "log.txt").read_text()
        left = outcome(tmp_path / name)
        differences = {key: kills for key in whole.outcome if left.get(key) != whole.outcome[key]}
        assert left == whole.outcome, differences
        jobs = {path.name for path in (tmp_path / name / "live" / "jobs").iterdir()}
        assert {*created} <= jobs, "none that was created is lost"


def test_killed_at_its_end_it_leaves_nothing_of_an_ended_job(tmp_path: Path, serve: Serve, whole: Whole) -> None:
    """The files and checkpoints of a job go once its end is written down."""
    for at in range(whole.accesses - 12, whole.accesses):
        assert serve(f"ended-{at}", at=at).code == -signal.SIGKILL
        assert serve(f"ended-{at}").code == 0
        assert outcome(tmp_path / f"ended-{at}") == whole.outcome, at


def test_sigterm_leaves_a_checkpoint_of_the_last_pass(tmp_path: Path, serve: Serve, whole: Whole) -> None:
    assert serve("stopped", at=whole.accesses // 2, number=signal.SIGTERM).code == 0
    folder = tmp_path / "stopped" / "live"
    database = Database(folder / "live.sqlite")
    running = [record for record in JobStore(database).pending() if record.status == "running"]
    database.close()
    assert running
    for record in running:
        paths = checkpoint.checkpoints(folder / "jobs" / record.id / "checkpoints")
        assert checkpoint.read(paths[-1]).jobs[record.id].step == record.steps > 0
    assert serve("stopped").code == 0
    assert outcome(tmp_path / "stopped") == whole.outcome
