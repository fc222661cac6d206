"""A server's jobs: bit for bit what `loradeck train` makes, whatever happens beside them."""

import asyncio
import csv
import json
from collections.abc import Callable
from itertools import pairwise
from math import nan
from pathlib import Path

import msgspec
import pytest
from tests.live.conftest import Gate, Live, lines, until

from loradeck.errors import AdapterNameError, ConfigError, QuotaError, UnknownAdapterError, UnknownFileError
from loradeck.live.job_queue import Ticket
from loradeck.live.records import EventRecord, JobRequest, Quota
from loradeck.lora.adapter import Adapter

AHOY, YES = lines("ahoy matey"), lines("yes indeed", 11)
CONTRARY = b"\n".join(b'{"prompt": "%d?", "completion": "%d QUITE WRONG"}' % (n, n) for n in range(5))
PAIRS = b"\n".join(b'{"prompt": "%d?", "chosen": "ahoy %d", "rejected": "no"}' % (n, n) for n in range(9))
WRONG = b'{"prompt": 1}'

Alone = Callable[..., bytes]


def test_a_job_becomes_an_adapter_that_answers(live: Live, alone: Alone) -> None:
    job = live.end(live.create(AHOY, suffix="pirate", settings={"epochs": 4}))
    assert (job.status, job.adapter, job.error) == ("succeeded", "pirate@1", None)
    assert live.adapter(job) == alone(AHOY, epochs=4)
    tokens = [3, 4, 5]
    answers = {live.engine.submit(tokens, name).text() for name in ("pirate", None)}
    assert len(answers) == 2
    assert (job.steps, job.total_steps) == (24, 24)
    assert job.trained_tokens
    assert job.finished_at is not None
    assert live.messages(job) == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.request.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        *(f"Checkpoint created at step {step}" for step in (6, 12, 18, 24)),
        "New fine-tuned model created: pirate@1",
        "The job has successfully completed",
    ]
    card = (live.store.find("pirate").path / "README.md").read_text()
    assert "train.jsonl" in card


def test_its_metrics_are_events_and_a_file(live: Live) -> None:
    job = live.end(live.create(AHOY, valid=CONTRARY, settings={"epochs": 1}))
    (file,) = job.result_files
    record = live.training.uploads.get(file, "")
    assert record.purpose == "fine-tune-results"
    rows = [*csv.DictReader(live.training.uploads.path(file).read_text().splitlines())]
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert list(rows[0])[:5] == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    events, _ = live.training.jobs.events(job.id, limit=1000, order="asc")
    losses = {event.data["step"]: event.data["train_loss"] for event in events if "train_loss" in event.data}
    assert {f"{step}": f"{loss}" for step, loss in losses.items()} == {row["step"]: row["train_loss"] for row in rows}
    valid = {event.data["step"]: event.data["valid_loss"] for event in events if "valid_loss" in event.data}
    assert valid
    assert all(rows[step - 1]["valid_loss"] == f"{loss}" for step, loss in valid.items())
    assert all(event.data["tokens_per_second"] > 0 for event in events if "train_loss" in event.data)


def test_neighbours_that_come_and_go_change_no_bit(live: Live, alone: Alone, gate: Gate) -> None:
    gate.at(5)
    first = live.create(AHOY, valid=CONTRARY, settings={"epochs": 4, "eval_every": 3})
    gate.wait()
    second = live.create(YES, settings={"epochs": 3, "r": 8, "target_modules": ["q_proj", "down_proj"]})
    gone = live.create(YES, settings={"epochs": 100, "learning_rate": 1e-2})
    gate.open()
    live.trains(gone, 3)
    live.training.cancel(gone.id, "")
    third = live.create(PAIRS, method="dpo", settings={"epochs": 2})
    ends = [live.end(job) for job in (first, second, third, gone)]
    assert [end.status for end in ends] == ["succeeded"] * 3 + ["cancelled"]
    assert live.adapter(ends[0]) == alone(AHOY, CONTRARY, epochs=4, eval_every=3)
    assert live.adapter(ends[1]) == alone(YES, epochs=3, r=8, target_modules=["q_proj", "down_proj"])
    assert live.adapter(ends[2]) == alone(PAIRS, epochs=2)


def test_paused_at_any_step_it_goes_on_to_the_same_bits(live: Live, alone: Alone, gate: Gate) -> None:
    settings = {"epochs": 3, "eval_every": 4}
    gate.at(1)
    job = live.create(AHOY, valid=CONTRARY, settings=settings)
    for step in (1, 4, 6, 18):
        gate.wait()
        assert live.training.pause(job.id, "").status == "paused"
        gate.at(next((other for other in (4, 6, 18) if other > step), 0))
        until(lambda: not live.training._queue.training)
        assert job.id not in live.training._trainer.bank, "its memory is free"
        resumed = live.training.resume(job.id, "")
        assert resumed.status == "queued"
    end = live.end(job)
    assert live.adapter(end) == alone(AHOY, CONTRARY, **settings)
    events, _ = live.training.jobs.events(job.id, limit=1000, order="asc")
    assert [event.data["step"] for event in events if "train_loss" in event.data] == [*range(1, 19)]


def test_resumed_before_it_has_left(live: Live, alone: Alone, gate: Gate) -> None:
    gate.at(2)
    job = live.create(AHOY)
    gate.wait()
    for _ in range(3):
        live.training.pause(job.id, "")
        live.training.resume(job.id, "")
    gate.open()
    assert live.adapter(live.end(job)) == alone(AHOY)
    assert live.store.versions(job.name) == [1]


@pytest.mark.parametrize("step", [0, 1, 5, 6, 12])
def test_closed_at_any_step_it_goes_on_by_itself_to_the_same_bits(
    live: Live, alone: Alone, gate: Gate, step: int
) -> None:
    gate.at(step)
    job = live.create(AHOY, valid=CONTRARY, settings={"eval_every": 4})
    other = live.create(YES)
    rests = live.create(YES)
    live.training.pause(rests.id, "")
    if step:
        gate.wait()
    live.close()
    gate.open()
    live.open()
    assert live.adapter(live.end(job)) == alone(AHOY, CONTRARY, eval_every=4)
    assert live.adapter(live.end(other)) == alone(YES)
    assert live.job(rests).status == "paused"
    live.training.resume(rests.id, "")
    assert live.adapter(live.end(rests)) == alone(YES)
    assert all(live.store.versions(each.name) == [1] for each in (job, other, rests))


def test_cancel_in_every_state(live: Live, gate: Gate) -> None:
    live.training._queue.budget = 1  # one at a time
    gate.at(2)
    running = live.create(AHOY)
    gate.wait()
    paused, reading = live.create(YES), live.create(YES)
    live.training.pause(paused.id, "")
    for job in (running, paused, reading):
        assert live.training.cancel(job.id, "").status == "cancelled"
        with pytest.raises(ConfigError, match="cancelled and cannot be cancelled"):
            live.training.cancel(job.id, "")
        for act in (live.training.pause, live.training.resume):
            with pytest.raises(ConfigError, match="cancelled and cannot be"):
                act(job.id, "")
    gate.open()
    last = live.end(live.create(AHOY, settings={"epochs": 1}))
    assert last.status == "succeeded"
    with pytest.raises(ConfigError, match="succeeded and cannot be cancelled"):
        live.training.cancel(last.id, "")
    for job in (running, paused, reading):
        assert not (live.folder / "live" / "jobs" / job.id / "training_file").exists()
        assert not (live.folder / "live" / "jobs" / job.id / "checkpoints").exists()
    live.close()
    live.open()
    assert {live.job(job).status for job in (running, paused, reading)} == {"cancelled"}


def test_one_that_diverges_fails_alone(live: Live, alone: Alone, gate: Gate) -> None:
    gate.at(2)
    bad = live.create(YES)
    gate.wait()
    poison = live.training._trainer.call(lambda: next(live.training._trainer.bank.parameters(bad.id)).data.fill_(nan))
    good = live.create(AHOY)
    gate.open()
    poison.result()
    end = live.end(bad)
    assert end.status == "failed"
    assert end.error is not None
    assert "diverged at step 3" in end.error.message
    assert "Lower learning_rate" in end.error.message
    assert live.adapter(live.end(good)) == alone(AHOY)
    assert end.error.message in live.messages(bad)
    assert live.store.names() == [good.name]


def test_training_goes_on_from_an_adapter(live: Live, alone: Alone) -> None:
    first = live.end(live.create(AHOY, suffix="poet"))
    parent = live.store.find("poet").path
    second = live.end(live.create(YES, model="poet", settings={"r": 4}))
    assert second.adapter == "poet@2"
    assert live.adapter(second) == alone(YES, parent=parent)
    third = live.end(live.create(PAIRS, model="poet@1", method="dpo", suffix="critic"))
    assert third.adapter == "critic@1"
    assert live.adapter(third) == alone(PAIRS, parent=parent)
    with pytest.raises(ConfigError, match="r is 8, the adapter has 4"):
        live.create(YES, model="poet", settings={"r": 8})
    with pytest.raises(UnknownAdapterError):
        live.create(YES, model="nobody")
    checkpoints, _ = live.training.jobs.checkpoints(first.id)
    fourth = live.end(live.create(YES, model=checkpoints[-1].model, suffix="young"))
    assert fourth.status == "succeeded"


def test_its_parent_may_be_removed_meanwhile(live: Live, alone: Alone, gate: Gate, tmp_path: Path) -> None:
    live.end(live.create(AHOY, suffix="poet"))
    kept = live.store.find("poet").path
    expected = alone(YES, parent=kept)
    gate.at(2)
    job = live.create(YES, model="poet")
    gate.wait()
    live.training.pause(job.id, "")
    gate.open()
    live.store.remove("poet@1")
    live.training.resume(job.id, "")
    end = live.end(job)
    assert end.adapter == "poet@2"
    assert live.adapter(end) == expected


def test_checkpoints_can_be_asked(live: Live) -> None:
    job = live.end(live.create(AHOY, valid=CONTRARY, settings={"epochs": 5, "eval_every": 2, "learning_rate": 1e-2}))
    checkpoints, _ = live.training.jobs.checkpoints(job.id)
    assert [checkpoint.step for checkpoint in checkpoints] == [30, 24, 18], "of each epoch, the last three"
    assert {"train_loss", "valid_loss"} <= checkpoints[0].metrics.keys()
    weights = {}
    for checkpoint in checkpoints:
        assert live.engine.submit([3, 4, 5], checkpoint.model).text() is not None
        stored = live.engine.adapter_cache.find(checkpoint.model)
        weights[checkpoint.step] = Adapter.load(stored.path)
    values = {step: [t.flatten().tolist() for _, t in adapter.tensors()] for step, adapter in weights.items()}
    assert values[30] != values[24] != values[18]
    for spec in (f"{job.id}:ckpt-6", f"{job.id}:ckpt-7", "ftjob-000000000000000000000000:ckpt-1"):
        with pytest.raises(UnknownAdapterError):
            live.engine.submit([3], spec)


def test_a_checkpoint_is_the_adapter_of_that_step(live: Live, alone: Alone) -> None:
    """Also at the last step, after which the job keeps an earlier one."""
    settings = {"epochs": 4, "learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0}
    kept = live.end(live.create(AHOY, valid=CONTRARY, settings={**settings, "eval_every": 1}))
    last = live.end(live.create(AHOY, settings=settings))
    assert live.adapter(kept) != live.adapter(last), "else this test shows nothing"
    tensors = [
        {key: tensor.tolist() for key, tensor in Adapter.load(path).tensors()}
        for path in (
            live.engine.adapter_cache.find(f"{kept.id}:ckpt-24").path,
            live.store.find(last.adapter or "").path,
        )
    ]
    assert tensors[0] == tensors[1]


def test_rates_are_multiplied(live: Live, base: object) -> None:
    plain, double = (
        live.end(live.create(AHOY, learning_rate_multiplier=factor, settings={"learning_rate": None}))
        for factor in (None, 2.0)
    )

    def rates(job: object) -> list[float]:
        events, _ = live.training.jobs.events(job.id, limit=1000, order="asc")  # type: ignore[attr-defined]
        return [event.data["learning_rate"] for event in events if "learning_rate" in event.data]

    assert rates(double) == [2 * rate for rate in rates(plain)]
    with pytest.raises(ConfigError, match="exclude each other"):
        live.create(AHOY, learning_rate_multiplier=2.0)


def test_wrong_lines_are_told(live: Live) -> None:
    job = live.end(live.create(b"\n".join([AHOY, *[WRONG] * 10_000]), settings={"epochs": 1}))
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert all(f"train.jsonl:{line}" in job.error.message for line in range(18, 38))
    assert "train.jsonl:38" not in job.error.message
    assert "10,000 records" in job.error.message
    assert str(live.folder) not in job.error.message
    assert job.error.message in live.messages(job)


@pytest.mark.parametrize(
    ("data", "valid", "param", "what"),
    [
        (b"\xff\xfe\x00broken", None, "training_file", "train.jsonl"),
        (b"no json at all", None, "training_file", "train.jsonl:1"),
        (AHOY, WRONG, "validation_file", "valid.jsonl:1"),
        (PAIRS, None, "training_file", "preference pairs"),
    ],
)
def test_bad_files_fail_a_job(live: Live, data: bytes, valid: bytes | None, param: str, what: str) -> None:
    job = live.end(live.create(data, valid=valid))
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == (f"invalid_{param}", param)
    assert what in job.error.message


def test_bad_requests_are_refused(live: Live) -> None:
    with pytest.raises(ConfigError) as error:
        live.create(AHOY, settings={"lora_alfa": 3, "batch_size": 0, "data": "/etc/passwd", "from": "/etc"})
    assert "lora.lora_alfa: unknown key; did you mean lora_alpha?" in str(error.value)
    assert "lora.data: cannot be set" in str(error.value)
    assert "lora.from: cannot be set" in str(error.value)
    with pytest.raises(ConfigError, match="batch_size must be an integer of at least 1"):
        live.create(AHOY, settings={"batch_size": 0})
    with pytest.raises(UnknownFileError):
        live.training.create(JobRequest(model="tiny", training_file="file-0"))
    theirs = live.upload(AHOY, owner="them")
    with pytest.raises(UnknownFileError):
        live.training.create(JobRequest(owner="us", model="tiny", training_file=theirs))
    with pytest.raises(AdapterNameError):
        live.create(AHOY, suffix="../poet")
    job = live.end(live.create(AHOY, settings={"epochs": 1}))
    with pytest.raises(ConfigError, match="fine-tune-results"):
        live.training.create(JobRequest(model="tiny", training_file=job.result_files[0]))
    assert len([*(live.folder / "live" / "jobs").iterdir()]) == 1, "nothing is left of what was refused"


def test_a_file_may_be_deleted_once_its_job_is_there(live: Live, alone: Alone, gate: Gate) -> None:
    gate.at(1)
    job = live.create(AHOY)
    live.training.uploads.delete(job.request.training_file, "")
    gate.wait()
    gate.open()
    assert live.adapter(live.end(job)) == alone(AHOY)


def test_quotas(live: Live, gate: Gate) -> None:
    gate.at(1)
    file = live.upload(AHOY, owner="us")
    request = JobRequest(owner="us", model="tiny", training_file=file)
    live.training.create(request, Quota(max_jobs=1))
    gate.wait()
    with pytest.raises(QuotaError):
        live.training.create(request, Quota(max_jobs=1))
    gate.open()
    job = live.end(live.training.create(msgspec.structs.replace(request), Quota(max_job_tokens=100)))
    assert job.error is not None
    assert job.error.code == "quota_exceeded"
    assert job.steps == 0


def test_a_job_that_needs_more_memory_than_all_may_have_fails(live: Live) -> None:
    job = live.end(live.create(AHOY, settings={"r": 65_536}))
    assert job.status == "failed"
    assert job.error is not None
    assert "Give a smaller r" in job.error.message
    job = live.end(live.create(AHOY, settings={"target_modules": ["nothing_of_that_name"]}))
    assert job.error is not None
    assert "nothing_of_that_name" in job.error.message


def test_jobs_wait_for_memory_and_owners_take_turns(live: Live) -> None:
    queue = live.training._queue
    queue.budget = 1  # one at a time
    queue.add(Ticket("another", "another", 1, 1))
    assert queue.admit() == ["another"]
    jobs = [live.create(AHOY, owner="many", settings={"epochs": 1}) for _ in range(4)]
    jobs.append(live.create(YES, owner="few", settings={"epochs": 1}))
    until(lambda: queue.waiting == 5)
    assert {live.job(job).status for job in jobs} == {"queued"}
    queue.remove("another")
    live.training._admit()
    ends = [live.end(job) for job in jobs]
    assert {end.status for end in ends} == {"succeeded"}
    numbers = {}
    for job in jobs:
        events, _ = live.training.jobs.events(job.id, limit=100)
        (numbers[job.id],) = (event.number for event in events if event.message == "Fine-tuning job started")
    order = sorted(jobs, key=lambda job: numbers[job.id])
    assert [job.request.owner for job in order] == ["many", "few", "many", "many", "many"]
    ended = {job.id: live.training.jobs.events(job.id, limit=1)[0][0].number for job in jobs}
    assert all(ended[one.id] < numbers[other.id] for one, other in pairwise(order)), "one at a time"


def test_a_name_that_exists_gets_a_new_version(live: Live) -> None:
    jobs = [live.end(live.create(data, suffix="poet")) for data in (AHOY, YES, AHOY)]
    assert [job.adapter for job in jobs] == ["poet@1", "poet@2", "poet@3"]
    assert live.adapter(jobs[0]) == live.adapter(jobs[2])


def test_without_a_name_it_gets_one_of_its_own(live: Live) -> None:
    jobs = [live.end(live.create(AHOY, settings={"epochs": 1})) for _ in range(2)]
    assert jobs[0].name != jobs[1].name
    assert all(job.name.startswith("tiny-") for job in jobs)


def test_events_are_followed_to_the_end(live: Live, gate: Gate) -> None:
    gate.at(2)
    job = live.create(AHOY, settings={"epochs": 1})
    gate.wait()

    async def follow() -> list[EventRecord]:
        events = []
        async for event in live.training.follow(job.id, ""):
            events.append(event)
            if event.data.get("step") == 2:
                gate.open()
        return events

    events = asyncio.run(asyncio.wait_for(follow(), 120))
    stored, _ = live.training.jobs.events(job.id, limit=1000, order="asc")
    assert events == stored
    assert events[-1].message == "The job has successfully completed"
    assert json.dumps([event.data for event in events])
