"""A server's jobs: bit for bit what `loradeck train` makes, whatever happens beside them."""

from collections.abc import Callable

from tests.live.conftest import Live, lines

AHOY, YES = lines("ahoy matey"), lines("yes indeed", 11)


def test_a_job_becomes_an_adapter_that_answers(live: Live, alone: Callable[..., bytes]) -> None:
    job = live.end(live.create(AHOY, suffix="pirate", settings={"epochs": 4}))
    assert (job.status, job.adapter, job.error) == ("succeeded", "pirate@1", None)
    assert live.adapter(job) == alone(AHOY, epochs=4)
    tokens = [3, 4, 5]
    answers = {live.engine.submit(tokens, name).text() for name in ("pirate", None)}
    assert len(answers) == 2
