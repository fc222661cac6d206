"""Speculative decoding through the engine: the same tokens and bits as without it, in fewer steps."""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.tiny_models import VOCABULARY, adapter, tiny_base

from loradeck import AdapterStore, Base
from loradeck.errors import ConfigError, LogitsError, RequestError
from loradeck.runner import draft_model
from loradeck.runner.draft_model import DraftModel
from loradeck.runner.request import Request, Scheduled
from loradeck.runner.speculation import Acceptance, PromptLookup
from loradeck.sampling import SamplingParams, Token, next_tokens
from loradeck.serve.config import EngineConfig
from loradeck.serve.drafter import Drafter
from loradeck.serve.engine import Engine
from loradeck.serve.scheduler import Scheduler

from .conftest import ids, prompts

Serve = Callable[..., Engine]
Asked = tuple[list[int], object, SamplingParams]
ENTRIES = [None, "a0", {"a1": 0.7, "a2": 0.3}, "a3"]
TOKEN_BYTES = 2 * 2 * 32 * 2 * 4  # of the tiny base: layers, heads, padded width, keys and values, float32
REPEATS = [5, 9, 7, 5, 9, 7, 5, 9]
LONG = SamplingParams(max_tokens=60, ignore_eos=True)


def asked(rng: random.Random) -> Asked:
    """A request of any kind, often with a text that repeats itself."""
    motif = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 20))]
    prompt = (motif * rng.randint(1, 6))[: rng.randint(1, 90)]
    temperature = rng.choice([0.0, 0.0, 0.2, 1.0])
    likely = dict.fromkeys(motif[:2], 30.0) if rng.random() < 0.5 else {}
    most = rng.choice([0, 1, 2, 7, 40, 60])
    sampling = SamplingParams(
        max_tokens=most,
        min_tokens=min(rng.choice([0, 0, 5]), most),
        temperature=temperature,
        top_k=rng.choice([0, 4]),
        top_p=rng.choice([1.0, 0.7]),
        seed=rng.randrange(1000),
        presence_penalty=rng.choice([0.0, 0.0, 0.3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.1]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.1]),
        logit_bias=likely,
        stop=rng.choice([(), (), ("a",), ("ab", "~")]),
        stop_token_ids=frozenset(rng.choice([[], motif[-1:], [40, 41]])),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, 0, 3]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
    )
    return prompt, rng.choice(ENTRIES), sampling


def answers(engine: Engine, requests: list[Asked]) -> list[tuple[list[Token], list[Token], str | None]]:
    """All that is told of each request, the bits of log-probabilities included."""
    generations = [engine.submit(*request) for request in requests]
    return [([*each], each.prompt, each.finish) for each in generations]


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> Counter[Scheduler]:
    """How often each scheduler took a request's room."""
    counts: Counter[Scheduler] = Counter()
    stop = Scheduler._stop

    def counted(self: Scheduler, request: Request) -> None:
        counts[self] += 1
        stop(self, request)

    monkeypatch.setattr(Scheduler, "_stop", counted)
    return counts


@pytest.mark.parametrize("seed", range(3))
def test_tokens_and_bits_are_those_of_single_steps(serve: Serve, preemptions: Counter[Scheduler], seed: int) -> None:
    """Whatever is asked: in chunks, in rows beside others, with known prefixes, and where rows give way."""
    rng = random.Random(seed)
    requests = [asked(rng) for _ in range(40)]
    single = serve(num_speculative_tokens=0, max_step_tokens=256)
    expected = answers(single, requests)
    assert single.stats.draft_tokens == 0
    roomy, tight = serve(max_rows=3), serve(max_rows=4, kv_cache_bytes=TOKEN_BYTES * 32 * 6)
    for engine in (roomy, roomy, tight):
        assert answers(engine, requests) == expected
        assert engine.stats.draft_tokens > engine.stats.accepted_tokens > 20
    assert roomy.stats.prefix_hits > 0
    assert preemptions[tight._loop._scheduler] > len(requests)


def test_what_repeats_itself_takes_fewer_steps(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve()
    run, steps = engine._runner.run, itertools.count()
    monkeypatch.setattr(engine._runner, "run", lambda *step: (next(steps), run(*step))[1])
    biased = SamplingParams(max_tokens=60, ignore_eos=True, logit_bias={5: 1000.0})
    assert ids(engine.generate([[5]], None, biased)[0]) == [5] * 60
    assert next(steps) < 15
    stats = engine.stats
    assert stats.drafts < 15
    assert stats.draft_tokens == stats.accepted_tokens > 45


def test_a_row_whose_drafts_are_always_wrong_stops_drafting(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve()
    expected = engine.generate([REPEATS], None, LONG)[0]
    before = engine.stats.draft_tokens
    never = next(token for token in range(3, VOCABULARY) if token not in ids(expected))
    monkeypatch.setattr(PromptLookup, "propose", lambda *_: [never] * 8)
    long = SamplingParams(max_tokens=200, ignore_eos=True, logit_bias={never: -1000.0})
    assert len(engine.generate([REPEATS], None, long)[0]) == 200
    assert 0 < engine.stats.draft_tokens - before < 40


def test_only_requests_of_the_compiled_step_are_drafted_for(
    serve: Serve, base: Base, store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.publish("head", adapter(base.model, 1, 2, ["lm_head"]))
    engine = serve()
    engine.generate([REPEATS], "head", LONG)
    assert engine.stats.draft_tokens == 0
    engine.generate([REPEATS], "a0", LONG)
    assert engine.stats.draft_tokens > 0
    with caplog.at_level(logging.INFO):
        eager = serve(enforce_eager=True)
    assert "no tokens are drafted" in caplog.text
    eager.generate([REPEATS], None, LONG)
    assert eager.stats.draft_tokens == 0


def test_an_error_at_a_later_place_comes_after_the_tokens_before_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()

    def failing(logits: Any, sequences: Any) -> list[Token | Exception]:
        tokens = next_tokens(logits, sequences)
        return [
            LogitsError("none") if own.generated == 30 else token for own, token in zip(sequences, tokens, strict=True)
        ]

    for user in ("sampler", "loop"):
        monkeypatch.setattr(f"loradeck.serve.{user}.next_tokens", failing)
    stream = engine.submit([5], None, SamplingParams(max_tokens=60, logit_bias={5: 1000.0}))
    tokens = []
    with pytest.raises(RequestError):
        tokens.extend(iter(stream))
    assert [token.id for token in tokens] == [5] * 30
    assert stream.finish == "failed"
    assert engine.stats.running == 0


# ---- a draft model


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of a model cost nothing, and nothing is looked up."""
    monkeypatch.setattr(Acceptance, "cost", property(lambda _: 0.0, lambda *_: None), raising=False)
    monkeypatch.setattr(PromptLookup, "propose", lambda *_: [])


@pytest.mark.usefixtures("free")
def test_a_draft_model_that_is_the_base_is_always_right(serve: Serve, base: Base, monkeypatch: Any) -> None:
    monkeypatch.setattr(draft_model, "READ", 16)  # so that long texts are read in parts
    texts = prompts(6)
    expected = serve(num_speculative_tokens=0).generate(texts, None, LONG)
    engine = serve(draft_model=base)
    assert engine.generate(texts, None, LONG) == expected
    stats = engine.stats
    assert stats.draft_tokens == stats.accepted_tokens > 150


@pytest.mark.usefixtures("free")
def test_its_drafts_change_nothing(serve: Serve, preemptions: Counter[Scheduler], tiny_tokenizer: Any) -> None:
    """Of another model, through adapters that only the base has, and where rows give way."""
    rng = random.Random(3)
    requests = [asked(rng) for _ in range(40)]
    expected = answers(serve(num_speculative_tokens=0, max_step_tokens=256), requests)
    engine = serve(kv_cache_bytes=TOKEN_BYTES * 32 * 6, draft_model=tiny_base("qwen2", tiny_tokenizer))
    assert answers(engine, requests) == expected
    assert engine.stats.draft_tokens > engine.stats.accepted_tokens
    assert preemptions[engine._loop._scheduler] > len(requests)


def test_one_that_costs_a_step_of_the_base_is_not_asked(serve: Serve, base: Base, monkeypatch: Any) -> None:
    monkeypatch.setattr(PromptLookup, "propose", lambda *_: [])
    engine = serve(draft_model=base)
    engine.generate([REPEATS], None, LONG)
    assert engine.stats.draft_tokens == 0


def test_one_of_another_vocabulary_is_refused(serve: Serve, base: Base, spaced_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="the draft model other has another vocabulary than tiny"):
        serve(draft_model=replace(base, tokenizer=spaced_tokenizer, name="other"))


@pytest.mark.usefixtures("free")
def test_one_that_fails_is_given_up(serve: Serve, base: Base, monkeypatch: Any, caplog: Any) -> None:
    engine = serve(draft_model=base)
    expected = engine.generate([REPEATS], None, LONG)
    monkeypatch.setattr(DraftModel, "propose", lambda *_: exec("raise MemoryError('no room')"))
    assert engine.generate([REPEATS], None, LONG) == expected
    assert caplog.text.count("the draft model failed") == 1


# ---- room


class Rows:
    """Room for a number of tokens of each request."""

    def __init__(self, room: int) -> None:
        self.room, self.taken = room, Counter[Request]()

    def reserve(self, request: Request, tokens: int) -> bool:
        if tokens <= self.room:
            self.taken[request] = tokens
        return tokens <= self.room

    def release(self, request: Request) -> None:
        del self.taken[request]


def test_there_are_no_drafts_without_room_and_room_is_given_back() -> None:
    request = Request(REPEATS, LONG)
    request.computed = 7
    for room, count in ((8, 0), (20, 4)):
        rows = Rows(room)
        drafter = Drafter(EngineConfig(), rows, lambda _: True, longest=100)
        (work,) = drafter.draft([Scheduled(request, 1)])
        assert len(work.drafts) == count
        assert rows.taken[request] == (8 + count if count else 0)
        if count:
            drafter.record(work, 0, runs=True)
            assert rows.taken[request] == 8


@pytest.mark.parametrize(
    ("longest", "max_tokens", "count"), [(100, 60, 4), (11, 60, 2), (9, 60, 0), (100, 3, 2), (100, 1, 0)]
)
def test_nothing_is_drafted_that_could_not_be_said(longest: int, max_tokens: int, count: int) -> None:
    request = Request(REPEATS, SamplingParams(max_tokens=max_tokens))
    request.computed = 7
    drafter = Drafter(EngineConfig(), Rows(1000), lambda _: True, longest=longest)
    (work,) = drafter.draft([Scheduled(request, 1)])
    assert [*work.drafts] == [7, 5, 9, 7][:count]


def test_a_draft_model_that_cannot_help_is_said(serve: Serve, base: Base, caplog: pytest.LogCaptureFixture) -> None:
    serve(draft_model=base)
    assert "too large to save time: 100 % of the base" in caplog.text
    serve(draft_model=base, num_speculative_tokens=0)
    assert "is not used: no tokens are drafted" in caplog.text
