"""`loradeck serve --train` as a process, and `loradeck jobs` on it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.api.conftest import LocalServer

from loradeck import Base
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.metrics import Metrics
from loradeck.cli.jobs import _events
from loradeck.cli.openai_client import OpenAIClient
from loradeck.live.live_training import LiveTraining
from loradeck.serve.engine import Engine
from loradeck.store import AdapterStore
from loradeck.train.events import Evaluation, Sample, Step

TIMEOUT = 600.0  # seconds; only a deadlock takes as long
DATA = b"".join(json.dumps({"prompt": f"{n}?", "completion": "aaaa"}).encode() + b"\n" for n in range(6))
LORA: Any = {"lora": {"r": 2, "learning_rate": 1e-2, "batch_size": 2}}


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that trains, and its URL once it is ready."""
    command = [sys.executable, "-W", "error", "-m", "loradeck", "serve", *map(str, arguments), "--train", "--port", "0"]
    command += ["--log-level", "warning"]  # nobody reads its log meanwhile
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert " on http" in ready, process.communicate()[1]
            yield process, ready.partition(" on ")[2].partition(",")[0]
        finally:
            process.kill()


@contextmanager
def client_of(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client:
        yield client


def create(client: openai.OpenAI, name: str, epochs: int) -> str:
    file = client.files.create(file=("train.jsonl", DATA), purpose="fine-tune")
    body = {"lora": {**LORA["lora"], "epochs": epochs}}
    model = client.models.list().data[0].id
    return client.fine_tuning.jobs.create(model=model, training_file=file.id, suffix=name, extra_body=body).id


def wait(client: openai.OpenAI, id: str, until: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while not until(job := client.fine_tuning.jobs.retrieve(id)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return job


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_jobs_go_on_after_an_end(tiny_folder: Path, adapters: Path, end: signal.Signals) -> None:
    flags = (tiny_folder, "--adapters", adapters, "--checkpoint-every", 5)
    with serving(*flags) as (process, url):
        with client_of(url) as client:
            id = create(client, "ah", epochs=15)
            wait(client, id, lambda job: job.steps >= 7 or job.status == "failed")
        process.send_signal(end)
        errors = process.communicate(timeout=TIMEOUT)[1]
        assert process.returncode == (-end if end == signal.SIGKILL else 0), errors
    with serving(*flags) as (process, url), client_of(url) as client:
        job = wait(client, id, lambda job: job.status not in ("queued", "running", "validating_files"))
        assert (job.status, job.error, job.steps, job.fine_tuned_model) == ("succeeded", None, 45, "ah@1")
        steps = [
            event.data["step"]
            for event in client.fine_tuning.jobs.list_events(id, limit=1000)
            if event.type == "metrics"
        ]
        assert sorted(steps) == [*range(1, 46)]
        assert client.completions.create(model="ah", prompt="1?", max_tokens=2).choices
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
    assert AdapterStore(adapters).versions("ah") == [1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--train"], "--train needs a folder to publish adapters in\nAdd --adapters FOLDER."),
        (["--train-share", "0.2"], "--train-share is a setting of training\nAdd --train."),
        (["--max-file-bytes=5"], "--max-file-bytes is a setting of training\nAdd --train."),
        (["--train-share", "2"], "train_share=2.0 is above 1"),
    ],
)
def test_flags_are_checked_before_the_base_is_loaded(run: Callable[..., Any], flags: list[str], says: str) -> None:
    ran = run("serve", "nothing", *flags)
    assert ran.code == 2
    assert says in ran.err


KEY = "k" * 8


@pytest.fixture
def url(base: Base, tmp_path: Path, one_thread: None) -> Iterator[str]:
    """A server in this process that trains, with a key."""
    metrics = Metrics("tiny")
    (tmp_path / "store").mkdir()
    keys = ApiKeys([ApiKey("alice", hashlib.sha256(KEY.encode()).hexdigest(), train=True)])
    with (
        Engine(base, AdapterStore(tmp_path / "store"), observer=metrics) as engine,
        LiveTraining(engine, tmp_path / "live") as training,
        LocalServer(engine, metrics, {"keys": keys, "training": training}).listening() as (url, _),
    ):
        yield url


@pytest.fixture
def jobs(run: Callable[..., Any], url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("LORADECK_KEY", KEY)
    return lambda *arguments: run("jobs", *arguments, "--server", url)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT) as client:
        yield client


def test_jobs_are_listed_shown_watched_and_changed(jobs: Callable[..., Any], client: openai.OpenAI) -> None:
    assert jobs().out.startswith("no jobs on http://")
    first = create(client, "ah", epochs=2)
    watched = jobs("watch", "ah")
    assert watched.code == 0, watched.err
    assert watched.out.strip().endswith(f"{first} is succeeded: ah@1")
    assert "6/6" in watched.out
    assert jobs("watch").out.strip().endswith("ah@1")  # of one that has ended
    assert "Checkpoint created at step 3" in watched.out, "what happens besides the steps, such as a pause"
    second = create(client, "bee", epochs=5000)
    paused = jobs("pause", "bee")
    assert (paused.code, paused.out.strip()) == (0, f"{second} is paused")
    table = jobs("ls").out.splitlines()
    assert table[0].split() == ["name", "status", "steps", "adapter", "model", "created", "id"]
    assert [line.split()[:2] for line in table[1:3]] == [["bee", "paused"], ["ah", "succeeded"]]
    assert jobs("resume", second).code == 0
    assert jobs("cancel", second).out.strip() == f"{second} is cancelled"
    shown = jobs("show", "ah").out
    assert all(
        part in shown for part in (first, "succeeded", "ah@1", "6/6", "r=2", "The job has successfully completed")
    )
    assert json.loads(jobs("show", "--json").out)["id"] == second
    assert [job["id"] for job in json.loads(jobs("--json").out)] == [second, first]


def test_watched_samples_are_events_of_a_run(url: str, client: openai.OpenAI) -> None:
    file = client.files.create(file=("train.jsonl", DATA), purpose="fine-tune")
    body = {"lora": {**LORA["lora"], "epochs": 1, "valid_ratio": 0.5, "eval_every": 1, "samples": 2}}
    id = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="ah", extra_body=body).id
    messages: list[str] = []
    events = [*_events(OpenAIClient(url, KEY), id, "ah", messages.append)]
    assert [type(event) for event in events] == [Step, Evaluation, Sample, Sample] * 2
    assert [event.step for event in events if isinstance(event, Sample)] == [1, 1, 2, 2]
    assert {event.expected for event in events if isinstance(event, Sample)} == {"aaaa"}
    assert not any("sample" in message for message in messages)


def test_a_job_that_failed_is_an_error(jobs: Callable[..., Any], client: openai.OpenAI) -> None:
    file = client.files.create(file=("train.jsonl", b"{broken"), purpose="fine-tune")
    client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="ah")
    ran = jobs("watch", "ah")
    assert ran.code == 2
    assert " failed: " in ran.err
    assert "train.jsonl" in ran.err
    assert "train.jsonl" in jobs("show", "ah").out


@pytest.mark.parametrize("columns", ["20", "40", "60"])
def test_a_narrow_terminal(
    jobs: Callable[..., Any], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    create(client, "ah", epochs=1)
    jobs("watch")
    monkeypatch.setenv("COLUMNS", columns)
    out = jobs("ls").out
    assert "ah" in out
    assert "succeeded" in out
    assert "created" in out.partition("no room for ")[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cancel"], "cancel needs a job\nGive its id; `loradeck jobs` lists them."),
        (["show", "ah"], "no job is named 'ah'\n`loradeck jobs` lists them."),
        (["watch"], "has no jobs"),
        (["cancel", "ftjob-none"], "there is no job 'ftjob-none'"),
        (["ls", "ah"], "loradeck jobs show ah"),
        (["watch", "--json"], "loradeck jobs show JOB --json"),
        (["stop", "ah"], "stop"),
        (["--key", "wrong"], "Invalid API key.\nGive the server's key with --key, or in LORADECK_KEY."),
    ],
)
def test_errors_are_in_the_words_of_flags(jobs: Callable[..., Any], arguments: list[str], says: str) -> None:
    ran = jobs(*arguments)
    assert ran.code == 2
    assert says in ran.err


def test_no_server(run: Callable[..., Any]) -> None:
    ran = run("jobs", "--server", "http://127.0.0.1:1")
    assert ran.code == 2
    assert "cannot reach http://127.0.0.1:1" in ran.err
