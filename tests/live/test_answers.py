"""Answers of adapters in training: they change no bit, give way to requests, and end with their job."""

from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
from tests.live.conftest import Live, lines, until

from loradeck.errors import ConfigError
from loradeck.generation import generate
from loradeck.live import answers
from loradeck.live.live_trainer import LiveTrainer
from loradeck.live.records import JobRecord
from loradeck.sampling import SamplingParams

TIMEOUT = 600.0  # seconds; only a deadlock takes as long
AHOY, YES = lines("ahoy matey"), lines("yes indeed", 5)
SAMPLED = {"samples": 2, "eval_every": 3}


def samples(live: Live, job: JobRecord) -> dict[int, list[dict[str, str]]]:
    """What the events of a job tell, by step."""
    events, _ = live.training.jobs.events(job.id, limit=1000, order="asc")
    return {event.data["step"]: event.data["samples"] for event in events if "samples" in event.data}


def test_samples_change_no_bit_and_are_the_adapters_answers(live: Live, alone: Callable[..., bytes]) -> None:
    """The checkpoint of the last step is asked the same, through the engine."""
    job = live.end(live.create(AHOY, valid=YES, settings={**SAMPLED, "epochs": 2}))
    assert job.error is None
    assert live.adapter(job) == alone(AHOY, YES, epochs=2, eval_every=3)
    by_step = samples(live, job)
    assert [*by_step] == [3, 6, 9, 12]
    tokenizer = live.base.tokenizer
    messages = [{"role": "user", "content": "0?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    sampling = SamplingParams(max_tokens=answers.ANSWER_TOKENS)
    answer = live.engine.submit(prompt, f"{job.id}:ckpt-12", sampling).text()
    assert by_step[12][0]["expected"] == "yes indeed 0"
    assert by_step[12][0]["answer"] == answer


def test_requests_have_their_turns_within_an_answer(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, counts = [0], [0]
    pause = LiveTrainer._pause

    def count(self: LiveTrainer, serve: Callable[[], bool]) -> None:
        pauses[0] += 1
        pause(self, serve)

    def watch(*arguments: Any, **options: Any) -> list[str]:
        before = pauses[0]
        texts = generate(*arguments, **options)
        counts.append(pauses[0] - before)
        return texts

    monkeypatch.setattr(LiveTrainer, "_pause", count)
    monkeypatch.setattr(answers, "generate", watch)
    assert live.end(live.create(AHOY, valid=YES, settings=SAMPLED)).error is None
    modules = sum(1 for each in live.base.model.modules() if next(each.children(), None) is None)
    assert len(counts) > 4
    assert min(counts[1:]) > modules / 2  # even an answer of one token


def test_a_job_that_is_paused_within_an_answer_goes_on_to_the_same_bits(
    live: Live, alone: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Event()

    def wait(*_: Any, **__: Any) -> list[str]:
        begun.set()
        until(lambda: answers.pause() is not None)  # until it is interrupted
        return []

    with monkeypatch.context() as patch:
        patch.setattr(answers, "generate", wait)
        record = live.create(AHOY, valid=YES, settings=SAMPLED)
        assert begun.wait(TIMEOUT)
        assert live.training.pause(record.id, "").status == "paused"
        until(lambda: record.id not in live.training._queue)
    live.training.resume(record.id, "")
    job = live.end(record)
    assert job.error is None
    assert live.adapter(job) == alone(AHOY, YES, eval_every=3)
    assert [*samples(live, job)][-1] == 12


@pytest.mark.parametrize("count", [-1, 9, 2.0, True, "2"])
def test_a_number_of_samples_that_is_none(live: Live, count: object) -> None:
    with pytest.raises(ConfigError, match="samples must be an integer from 0 to 8"):
        live.create(AHOY, settings={"samples": count})
