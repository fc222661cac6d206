"""OpenAI's fine-tuning jobs through its client: from two datasets to two adapters that answer, and all that can be wrong."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from loradeck import AdapterStore
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.live.live_job import LiveJob
from loradeck.live.live_training import LiveTraining
from loradeck.live.records import Quota

from .conftest import TIMEOUT, LocalServer
from .test_files import sha

LORA = {"r": 2, "learning_rate": 1e-2, "target_modules": ["q_proj"]}
FAST: Any = {"hyperparameters": {"n_epochs": 2, "batch_size": 2}, "extra_body": {"lora": LORA}}
HELD: Any = {"hyperparameters": {"n_epochs": 500, "batch_size": 2}, "extra_body": {"lora": LORA}}
MESSAGES: Any = [{"role": "user", "content": "hi"}]
KEYS = ApiKeys(
    [
        ApiKey(
            "alice", sha("ka"), adapters=("mine-*", "poet"), train=True, create=("mine-*",), quota=Quota(max_jobs=1)
        ),
        ApiKey("bob", sha("kb"), adapters=("bobs-*",), train=True, quota=Quota(max_job_tokens=10)),
        ApiKey("carol", sha("kc"), adapters=("poet",)),
    ]
)


def dataset(answer: str, count: int = 6) -> bytes:
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": answer}] for n in range(count)]
    return b"".join(json.dumps({"messages": chat}).encode() + b"\n" for chat in chats)


def pairs(count: int = 4) -> bytes:
    yes, no = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
    row = {"input": {"messages": MESSAGES}, "preferred_output": yes, "non_preferred_output": no}
    return (json.dumps(row).encode() + b"\n") * count


@pytest.fixture
def url(training_server: LocalServer) -> Iterator[str]:
    with training_server.listening() as (url, _):
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Jobs take no further step until the returned function is called, or training is closed."""
    opened = threading.Event()
    after_pass = LiveJob._after_pass

    def hold(*given: Any) -> None:
        after_pass(*given)
        deadline = time.monotonic() + TIMEOUT
        while not opened.wait(0.01) and not closed():
            assert time.monotonic() < deadline

    trainings: list[LiveTraining] = []
    init = LiveTraining.__init__
    monkeypatch.setattr(LiveTraining, "__init__", lambda self, *given: (trainings.append(self), init(self, *given))[1])
    monkeypatch.setattr(LiveJob, "_after_pass", hold)

    def closed() -> bool:
        return any(training._closed for training in trainings)

    return opened.set


def upload(client: openai.OpenAI, content: bytes, name: str = "train.jsonl") -> str:
    return client.files.create(file=(name, content), purpose="fine-tune").id


def end_of(client: openai.OpenAI, id: str) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while (job := client.fine_tuning.jobs.retrieve(id)).status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return job


def ask(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0)
    return answer.choices[0].message.content or ""


def test_two_jobs_beside_a_stream(client: openai.OpenAI) -> None:
    """What the issue is done with: upload, train, stream meanwhile, and ask both."""
    before = {name: ask(client, name) for name in ("tiny", "poet")}
    files = [upload(client, dataset(answer)) for answer in ("aaaa", "bbbb")]
    jobs = [
        client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix=name, seed=7, **FAST)
        for file, name in zip(files, ("ah", "bee"), strict=True)
    ]
    assert [job.status for job in jobs] == ["validating_files"] * 2
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == before["tiny"]
    done = [end_of(client, job.id) for job in jobs]
    assert [(job.status, job.error, job.fine_tuned_model) for job in done] == [
        ("succeeded", None, "ah@1"),
        ("succeeded", None, "bee@1"),
    ]
    job = done[0]
    assert (job.object, job.model, job.training_file, job.seed) == ("fine_tuning.job", "tiny", files[0], 7)
    assert job.trained_tokens > 0
    assert job.created_at <= job.finished_at
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 2)
    assert job.method.type == "supervised"
    assert job.lora == LORA
    assert (job.steps, job.total_steps) == (6, 6)
    assert ask(client, "ah") == ask(client, "ah@1")
    assert {ask(client, "ah"), ask(client, "bee")}.isdisjoint(before.values())
    assert "ah" in [model.id for model in client.models.list()]
    assert [each.id for each in client.fine_tuning.jobs.list(limit=1)] == [jobs[1].id, jobs[0].id]
    content = client.files.content(job.result_files[0]).text
    assert content.splitlines()[0].startswith("step,")
    assert len(content.splitlines()) == 7
    results = client.files.list(purpose="fine-tune-results").data
    assert {file.id for file in results} == {id for job in done for id in job.result_files}


def test_events_and_checkpoints(client: openai.OpenAI, url: str) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, dataset("aaaa")), suffix="ah", **FAST
    )
    with httpx.stream("GET", f"{url}/v1/fine_tuning/jobs/{job.id}/events?stream=true", timeout=TIMEOUT) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    streamed = [json.loads(line) for line in lines]
    assert end_of(client, job.id).status == "succeeded"
    events = [*client.fine_tuning.jobs.list_events(job.id, limit=3)]  # page after page
    assert [event.id for event in events][::-1] == [event["id"] for event in streamed]
    metrics = [event for event in reversed(events) if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(event.data["train_loss"] > 0 and event.data["total_steps"] == 6 for event in metrics)
    rest = httpx.get(f"{url}/v1/fine_tuning/jobs/{job.id}/events?stream=true&after={events[1].id}", timeout=TIMEOUT)
    assert json.loads(rest.text.splitlines()[0].removeprefix("data: "))["id"] == events[0].id
    checkpoints = [*client.fine_tuning.jobs.checkpoints.list(job.id)]
    assert [each.step_number for each in checkpoints] == sorted(
        {each.step_number for each in checkpoints}, reverse=True
    )
    assert checkpoints
    for checkpoint in checkpoints:
        assert checkpoint.fine_tuned_model_checkpoint == f"{job.id}:ckpt-{checkpoint.step_number}"
        assert checkpoint.fine_tuning_job_id == job.id
        assert checkpoint.metrics.step == checkpoint.step_number
        assert ask(client, checkpoint.fine_tuned_model_checkpoint)
    assert ask(client, f"{checkpoints[0].fine_tuned_model_checkpoint}*0.5+poet*0.5")


def test_samples_at_evaluations(client: openai.OpenAI) -> None:
    """Answers to validation prompts, told once for each evaluation, with the adapter as it is then."""
    settings: Any = {"lora": {**LORA, "samples": 2, "eval_every": 2}}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(client, dataset("aaaa")),
        validation_file=upload(client, dataset("bbbb", 3)),
        suffix="ah",
        extra_body=settings,
        hyperparameters={"n_epochs": 2, "batch_size": 2},
    )
    assert job.lora == settings["lora"]
    assert end_of(client, job.id).error is None
    events = [event for event in reversed([*client.fine_tuning.jobs.list_events(job.id)]) if event.data]
    sampled = [event for event in events if "samples" in event.data]
    evaluated = [event for event in events if "valid_loss" in event.data]
    assert [event.type for event in sampled] == ["message"] * 3
    assert [event.data["step"] for event in sampled] == [event.data["step"] for event in evaluated] == [2, 4, 6]
    for event in sampled:
        assert [sample["expected"] for sample in event.data["samples"]] == ["bbbb"] * 2
        assert [sample["prompt"].split()[1] for sample in event.data["samples"]] == ["0?", "1?"]
        assert all(isinstance(sample["answer"], str) for sample in event.data["samples"])
    assert sampled[0].message == "Step 2: 2 samples"
    trained = [event.data for event in events if "train_loss" in event.data]
    assert all({"step", "train_loss", "learning_rate", "tokens_per_second"} <= data.keys() for data in trained)


def test_settings_of_every_kind(client: openai.OpenAI) -> None:
    """Preference pairs, validation, metadata, an adapter to go on from, and `auto`."""
    file = upload(client, pairs())
    auto: Any = {"n_epochs": 1, "batch_size": "auto", "beta": 0.5, "learning_rate_multiplier": 2.0}
    job = client.fine_tuning.jobs.create(
        model="poet",
        training_file=file,
        validation_file=file,
        method={"type": "dpo", "dpo": {"hyperparameters": auto}},
        metadata={"team": "a"},
        integrations=None,
        extra_body={"lora": {"learning_rate": "auto", "eval_every": 1}},
    )
    assert job.hyperparameters.model_dump(exclude_none=True) == auto
    assert job.method.dpo.hyperparameters.beta == 0.5
    assert (job.metadata, job.validation_file, job.name) == ({"team": "a"}, file, "poet")
    done = end_of(client, job.id)
    assert (done.status, done.error, done.fine_tuned_model) == ("succeeded", None, "poet@3")
    assert any("valid_loss" in event.data for event in client.fine_tuning.jobs.list_events(job.id))
    assert [each.id for each in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [job.id]
    assert [each.id for each in client.fine_tuning.jobs.list(metadata={"team": "b"})] == []
    plain = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, dataset("a")), hyperparameters={"n_epochs": "auto"}, suffix=None
    )
    assert plain.hyperparameters.n_epochs == "auto"
    assert end_of(client, plain.id).fine_tuned_model.endswith("@1")


def test_cancel_pause_and_resume(client: openai.OpenAI, held: Callable[[], None]) -> None:
    jobs = client.fine_tuning.jobs
    file = upload(client, dataset("aaaa"))
    job = jobs.create(model="tiny", training_file=file, suffix="ah", **FAST)
    assert jobs.pause(job.id).status == "paused"
    with pytest.raises(openai.BadRequestError, match="the job is paused and cannot be paused"):
        jobs.pause(job.id)
    assert jobs.resume(job.id).status in ("validating_files", "queued")
    assert jobs.cancel(job.id).status == "cancelled"
    for call, what in ((jobs.cancel, "cancelled"), (jobs.resume, "resumed"), (jobs.pause, "paused")):
        with pytest.raises(openai.BadRequestError, match=f"the job is cancelled and cannot be {what}"):
            call(job.id)
    held()
    succeeded = jobs.create(model="tiny", training_file=file, suffix="ah", **FAST)
    assert end_of(client, succeeded.id).status == "succeeded"
    with pytest.raises(openai.BadRequestError, match="succeeded"):
        jobs.resume(succeeded.id)
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError, match="there is no job 'ftjob-none'"):
            call("ftjob-none")


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b"\x00\x01\x02" * 1000, "train.jsonl", "train.jsonl"),
        (b"{}\n" * 10_000, "train.jsonl", "10,000|10000"),
        ("{'ü'}".encode("utf-16"), "train.jsonl", "train.jsonl"),
        (dataset("a") + b"{broken\n", "train.jsonl", ":7"),
        (b"a,b\n1,2\n", "train.csv", "train.csv"),
    ],
)
def test_a_file_that_is_no_dataset_fails_its_job(client: openai.OpenAI, content: bytes, name: str, says: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client, content, name), suffix="ah")
    done = end_of(client, job.id)
    assert done.status == "failed"
    assert done.error.param == "training_file"
    assert done.error.code
    assert any(part in done.error.message for part in says.split("|")), done.error.message
    assert "/" not in done.error.message.partition("\n")[0].replace("and/or", "")  # the server's own paths
    assert "ah" not in [model.id for model in client.models.list()]


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"training_file": "file-none"}, 404, "training_file", "there is no file 'file-none'"),
        ({"validation_file": "file-none"}, 404, "validation_file", "there is no file 'file-none'"),
        ({"model": "nobody"}, 404, "model", "nobody"),
        ({"model": "poet*0.5+pirate*0.5"}, 400, "model", "blend"),
        ({"model": "poet*0.5"}, 400, "model", "blend"),
        ({"model": ""}, 400, "model", "length >= 1"),
        ({"suffix": "a/poet"}, 400, "suffix", "'/'"),
        ({"suffix": "a" * 65}, 400, "suffix", "length <= 64"),
        ({"hyperparameters": {"n_epoch": 1}}, 400, "hyperparameters", "n_epoch"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs", ">= 1"),
        ({"hyperparameters": {"n_epochs": "many"}}, 400, "hyperparameters.n_epochs", "many"),
        ({"hyperparameters": {"beta": 1}}, 400, "hyperparameters", "beta"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, 400, "hyperparameters.learning_rate_multiplier", "> 0"),
        ({"method": {"type": "reinforcement"}}, 400, "method.type", "reinforcement"),
        ({"method": {"type": "supervised", "dpo": {}}}, 400, "method.dpo", "supervised"),
        (
            {
                "hyperparameters": {"n_epochs": 1},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
            },
            400,
            "hyperparameters.n_epochs",
            "twice",
        ),
        ({"hyperparameters": {"n_epochs": 1}, "lora": {"epochs": 2}}, 400, "n_epochs", "lora.epochs"),
        ({"lora": {"rank": 8}}, 400, "lora", "lora.rank: unknown key"),
        ({"lora": {"samples": 9}}, 400, "lora", "lora.samples must be an integer from 0 to 8, not 9"),
        ({"lora": {"samples": True}}, 400, "lora", "lora.samples must be"),
        ({"lora": {"r": 0, "epochs": -1}}, 400, "lora", "epochs must be"),
        ({"lora": {"data": "/etc/passwd"}}, 400, "lora", "lora.data: cannot be set"),
        ({"lora": {"from": "/etc"}}, 400, "lora", "lora.from: cannot be set"),
        ({"integrations": [{"type": "wandb"}]}, 400, "integrations", "wandb"),
        ({"metadata": {"a": "b" * 513}}, 400, "metadata", "512"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata", "16"),
        ({"seed": -1}, 400, "seed", ">= 0"),
    ],
)
def test_a_bad_request_is_one_clear_error(
    training_server: LocalServer, body: dict[str, Any], status: int, param: str, says: str
) -> None:
    training: LiveTraining = training_server.options["training"]
    with training.uploads.upload("", "train.jsonl", "fine-tune") as file:
        file.write(dataset("a"))
    response = training_server.request(
        "/v1/fine_tuning/jobs", {"model": "tiny", "training_file": file.record.id, **body}
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert says in error["message"]
    assert (error["param"] or "").startswith(param)
    assert str(training.folder) not in response.text
    assert training.jobs.list("") == ([], False)


def test_what_only_the_base_can_tell_fails_the_job(client: openai.OpenAI) -> None:
    file = upload(client, dataset("a"))
    lora: Any = {"lora": {"target_modules": ["nothing"]}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="ah", extra_body=lora)
    error = end_of(client, job.id).error
    assert "nothing" in error.message


def test_unknown_fields_are_ignored_as_elsewhere(client: openai.OpenAI) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, dataset("a")), suffix="ah", extra_body={"new": 1, "lora": None}
    )
    assert end_of(client, job.id).status == "succeeded"


def test_a_deleted_file(client: openai.OpenAI, held: Callable[[], None]) -> None:
    file = upload(client, dataset("a"))
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="ah", **FAST)
    client.files.delete(file)
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file)
    held()
    assert end_of(client, job.id).status == "succeeded"  # it has its own


@contextmanager
def tenants(server: LocalServer) -> Iterator[list[openai.OpenAI]]:
    with server.configured(**server.options, keys=KEYS).listening() as (url, _):
        clients = [
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT)
            for key in ("ka", "kb", "kc")
        ]
        try:
            yield clients
        finally:
            for each in clients:
                each.close()


def test_keys(training_server: LocalServer, held: Callable[[], None]) -> None:
    with tenants(training_server) as (alice, bob, carol):
        file = upload(alice, dataset("a"))
        job = alice.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="mine-a", **FAST)
        assert job.organization_id == "alice"
        # bob has a key that trains too, and sees nothing of it
        assert bob.fine_tuning.jobs.list().data == []
        for call in (
            bob.fine_tuning.jobs.retrieve,
            bob.fine_tuning.jobs.cancel,
            bob.fine_tuning.jobs.list_events,
            bob.fine_tuning.jobs.checkpoints.list,
        ):
            with pytest.raises(openai.NotFoundError, match="there is no job"):
                call(job.id)
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            bob.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="bobs-a")
        # names that a key may create, and models that it may use
        for suffix in ("poet", "bobs-a", None):
            with pytest.raises(openai.PermissionDeniedError, match="may not create the adapter") as denied:
                alice.fine_tuning.jobs.create(model="tiny", training_file=file, suffix=suffix)
            assert "mine-*" in denied.value.message
        with pytest.raises(openai.PermissionDeniedError, match="'poet'"):
            alice.fine_tuning.jobs.create(model="poet", training_file=file)  # it may use it, not replace it
        with pytest.raises(openai.PermissionDeniedError, match="may not use the adapter 'pirate'"):
            alice.fine_tuning.jobs.create(model="pirate", training_file=file, suffix="mine-b")
        with pytest.raises(openai.PermissionDeniedError, match="may not train"):
            carol.fine_tuning.jobs.list()
        # quotas
        with pytest.raises(openai.RateLimitError, match="may have 1 jobs at once") as limit:
            alice.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="mine-b", **FAST)
        assert limit.value.response.headers["x-should-retry"] == "false"
        held()
        assert end_of(alice, job.id).fine_tuned_model == "mine-a@1"
        again = alice.fine_tuning.jobs.create(model="poet", training_file=file, suffix="mine-a")
        assert end_of(alice, again.id).fine_tuned_model == "mine-a@2"
        large = bob.fine_tuning.jobs.create(model="tiny", training_file=upload(bob, dataset("a")), suffix="bobs-a")
        error = end_of(bob, large.id).error
        assert (error.code, error.param) == ("quota_exceeded", "training_file")
        # its checkpoints are its own
        checkpoint = alice.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
        assert ask(alice, checkpoint)
        for model in (checkpoint, f"{checkpoint}*0.5", f"tiny:{checkpoint}"):
            with pytest.raises(openai.NotFoundError, match="there is no job"):
                ask(bob, model)
        with pytest.raises(openai.NotFoundError):
            bob.models.retrieve(checkpoint)
        assert alice.models.retrieve(checkpoint).id == checkpoint
        with pytest.raises(openai.PermissionDeniedError):
            ask(bob, "mine-a")


def test_metrics(client: openai.OpenAI, url: str, held: Callable[[], None]) -> None:
    file = upload(client, dataset("a"))
    running = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="ah", **FAST)
    cancelled = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="bee", **FAST)
    client.fine_tuning.jobs.cancel(cancelled.id)
    labels = f'{{job="{running.id}",name="ah"}}'
    deadline = time.monotonic() + TIMEOUT
    while f"loradeck_job_loss{labels}" not in (text := httpx.get(f"{url}/metrics").text):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert 'loradeck_jobs{status="cancelled"} 1.0' in text
    assert f"loradeck_job_steps{labels} 1.0" in text
    assert f"loradeck_job_total_steps{labels} 6.0" in text
    assert cancelled.id not in text
    held()
    end_of(client, running.id)
    text = httpx.get(f"{url}/metrics").text
    assert 'loradeck_jobs{status="succeeded"} 1.0' in text
    assert running.id not in text


def test_a_store_that_another_server_trains(training_server: LocalServer, store: AdapterStore) -> None:
    """What belongs to training is no adapter of the store."""
    assert store.names() == ["pirate", "poet", "team-a"]
