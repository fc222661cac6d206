"""Rows of jobs, events and checkpoints."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loradeck.errors import ConfigError, QuotaError, UnknownJobError
from loradeck.live.database import Database
from loradeck.live.job_store import JobStore
from loradeck.live.records import JobError, JobRecord, JobRequest, Quota


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "live.sqlite")
    yield database
    database.close()


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database)


def add(jobs: JobStore, owner: str = "", **fields: object) -> JobRecord:
    request = JobRequest(owner=owner, model="tiny", training_file="file-1", **fields)
    return jobs.add(request, name="poet", seed=3)


def test_a_job_is_the_same_after_a_restart(tmp_path: Path) -> None:
    database = Database(tmp_path / "live.sqlite")
    settings = {"r": 4, "target_modules": ["q_proj"], "learning_rate": 1e-3, "init": None}
    job = add(JobStore(database), "alice", settings=settings, metadata={"ü": "x"}, method="dpo", suffix="poet")
    assert (job.status, job.seed, job.name) == ("validating_files", 3, "poet")
    changed = JobStore(database).update(
        job.id, status="failed", error=JobError("invalid_file", "bad", "training_file"), result_files=("file-2",)
    )
    database.close()
    database = Database(tmp_path / "live.sqlite")
    again = JobStore(database).get(job.id, "alice")
    assert again == changed
    assert again.request == job.request
    assert again.ended
    assert not job.ended
    database.close()


def test_an_owner_sees_their_own(jobs: JobStore) -> None:
    job = add(jobs, "alice")
    with pytest.raises(UnknownJobError, match=job.id):
        jobs.get(job.id, "bob")
    with pytest.raises(UnknownJobError):
        jobs.list("bob", after=job.id)
    assert jobs.list("bob") == ([], False)
    with pytest.raises(UnknownJobError, match="ftjob-none"):
        jobs.update("ftjob-none", status="paused")


def test_lists(jobs: JobStore) -> None:
    ids = [add(jobs, metadata={"team": str(number % 2), "n": str(number)}).id for number in range(5)]

    def listed(**filters: object) -> tuple[list[str], bool]:
        page, more = jobs.list("", **filters)
        return [job.id for job in page], more

    assert listed() == (ids[::-1], False)
    assert listed(limit=2) == ([ids[4], ids[3]], True)
    assert listed(limit=3, after=ids[3]) == ([ids[2], ids[1], ids[0]], False)
    assert listed(metadata={"team": "1"}) == ([ids[3], ids[1]], False)
    assert listed(metadata={"team": "1", "n": "3"}) == ([ids[3]], False)
    assert listed(metadata={"n": "'; DROP TABLE jobs; --"}) == ([], False)
    jobs.update(ids[1], status="succeeded")
    jobs.update(ids[2], status="paused")
    assert [job.id for job in jobs.pending()] == [ids[0], ids[2], ids[3], ids[4]]


def test_a_quota_counts_jobs_that_have_not_ended(jobs: JobStore) -> None:
    request = JobRequest(owner="alice", model="tiny", training_file="file-1")
    quota = Quota(max_jobs=2, max_job_tokens=1000)
    first, _ = (jobs.add(request, name="poet", seed=0, quota=quota) for _ in range(2))
    assert first.max_tokens == 1000
    with pytest.raises(QuotaError, match="may have 2 jobs at once, and has 2"):
        jobs.add(request, name="poet", seed=0, quota=quota)
    add(jobs, "bob")
    jobs.update(first.id, status="cancelled")
    jobs.add(request, name="poet", seed=0, quota=quota)


def test_a_quota_holds_for_threads(jobs: JobStore) -> None:
    request = JobRequest(owner="alice", model="tiny", training_file="file-1")
    start = threading.Barrier(8)
    refusals: list[QuotaError] = []

    def create() -> None:
        start.wait()
        try:
            jobs.add(request, name="poet", seed=0, quota=Quota(max_jobs=3))
        except QuotaError as error:
            refusals.append(error)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refusals) == 5
    assert len(jobs.list("alice")[0]) == 3


def test_events_are_paged_both_ways(jobs: JobStore) -> None:
    job, other = add(jobs).id, add(jobs).id
    begun = jobs.add_event(job, "the job has begun")
    steps = [jobs.add_event(job, f"step {step}", {"step": step, "loss": 1 / step}) for step in range(1, 5)]
    jobs.add_event(other, "step 9", {"step": 9})
    assert (begun.type, begun.level, steps[0].type) == ("message", "info", "metrics")
    assert jobs.events(job) == ([*steps[::-1], begun], False)
    assert jobs.events(job, limit=2) == ([steps[3], steps[2]], True)
    assert jobs.events(job, after=steps[2].id, limit=2) == ([steps[1], steps[0]], True)
    assert jobs.events(job, after=steps[1].id, order="asc") == (steps[2:], False)
    jobs.truncate_events(job, 2)
    assert jobs.events(job) == ([steps[1], steps[0], begun], False)
    later = jobs.add_event(job, "step 3", {"step": 3})
    assert later.number > steps[3].number  # so a client that has seen the old ones gets the new ones
    assert jobs.events(job, after=steps[3].id, order="asc") == ([later], False)
    assert len(jobs.events(other)[0]) == 1


@pytest.mark.parametrize("after", ["", "ftevent-1", "x", "ftevent-" + "f" * 24, "ftjob-" + "0" * 24])
def test_after_is_an_id(jobs: JobStore, after: str) -> None:
    with pytest.raises(ConfigError, match="is not the id of"):
        jobs.events("ftjob-1", after=after)


def test_checkpoints(jobs: JobStore) -> None:
    job = add(jobs).id
    first = jobs.add_checkpoint(job, 10, {"train_loss": 2.5})
    second = jobs.add_checkpoint(job, 20, {"train_loss": 1.5})
    assert first.model == f"{job}:ckpt-10"
    assert jobs.checkpoints(job) == ([second, first], False)
    again = jobs.add_checkpoint(job, 20, {"train_loss": 1.25})
    assert jobs.checkpoints(job, limit=1) == ([again], True)
    assert jobs.checkpoints(job, after=again.id) == ([first], False)
    jobs.remove_checkpoint(job, 10)
    assert jobs.checkpoints(job) == ([again], False)
