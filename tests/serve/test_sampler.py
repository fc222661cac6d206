"""What a step returns for each request: its next token, its prompt's log-probabilities, or its error."""

from typing import Any

import pytest
import torch

from loradeck.errors import LogitsError, RequestError
from loradeck.runner.request import Request, Scheduled
from loradeck.sampling import SamplingParams, Token
from loradeck.serve.sampler import StepResult, sample

V = 50


def request(prompt: list[int], **sampling: Any) -> Request:
    return Request(prompt, SamplingParams(**sampling))


def test_the_log_probabilities_of_a_prompt_come_in_chunks() -> None:
    own = request([5, 6, 7, 8], max_tokens=0, prompt_logprobs=1)
    rows = torch.randn(4, V)
    tokens: list[Token] = []
    for start, stop in ((0, 3), (3, 4)):
        work = Scheduled(own, stop - start)
        (result,) = sample([rows[start:stop][-work.logits_to_keep or stop :]], [work])
        tokens += result.prompt
        assert result.token is None
        own.computed = stop
    assert [token.id for token in tokens] == [5, 6, 7, 8]
    assert tokens[0].logprob is None
    expected = [float(rows[i].log_softmax(-1)[token]) for i, token in enumerate([6, 7, 8])]
    assert [token.logprob for token in tokens[1:]] == pytest.approx(expected)


def test_a_prompt_that_is_not_read_to_its_end_has_no_token_yet() -> None:
    assert sample([torch.zeros(0, V)], [Scheduled(request([5, 6, 7]), 2)]) == [StepResult()]


def test_each_request_has_its_own_result() -> None:
    logits = torch.randn(1, V)
    nan = torch.full((1, V), float("nan"))
    requests = [
        request([5]),
        request([5], temperature=1.0),
        request([5, 6], prompt_logprobs=0),
        request([5], min_tokens=1, stop_token_ids=frozenset({V + 1})),
        request([5]),
    ]
    batch = [Scheduled(own, own.pending) for own in requests]
    first, *failed, last = sample([logits, nan, nan.expand(2, -1), logits, logits], batch)
    assert first == last == StepResult(token=Token(int(logits.argmax())))
    assert [type(result.error) for result in failed] == [LogitsError, LogitsError, RequestError]
    assert "out of bounds" in str(failed[2].error)
