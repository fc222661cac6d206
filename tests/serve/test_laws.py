"""The invariants (docs/invariants.md) through the engine: rows alone and mixed, training's numbers, no leaks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.tiny_models import CONTEXT, MODELS, adapter

from loradeck import AdapterStore, Base
from loradeck.base.weights import Weights, prepare
from loradeck.errors import RequestError
from loradeck.sampling import SamplingParams, Token
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

from .conftest import alone, fill, greedy, ids, logprobs, prompts

ENTRIES = [None, "a0", {"a1": 0.7, "a2": 0.3}, "a3", {"a0": -0.5}]
SCORED = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=3)
ROUNDING = 2e-5  # of log-probabilities in float32
Serve = Callable[..., Engine]


def agree(told: list[Token], expected: torch.Tensor, first: int) -> None:
    """Tokens' numbers are those of the rows of `expected`, from row `first` on."""
    for place, token in enumerate(told, start=first):
        row = expected[place]
        assert token.logprob == pytest.approx(float(row[token.id]), abs=ROUNDING)
        assert [value for _, value in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=ROUNDING)
        assert all(value == pytest.approx(float(row[own]), abs=ROUNDING) for own, value in token.top)


# ---- 6: Serving's log-probs equal training's for the same adapter and text.


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_are_those_of_a_plain_forward(kind: str, make: Callable[[str], Base], tmp_path: Path) -> None:
    base = make(kind)
    store = fill(AdapterStore(tmp_path), base, kind)
    asked = prompts(5, seed=2)
    with Engine(base, store, EngineConfig(max_rows=4, max_step_tokens=16)) as engine:
        streams = [engine.submit(prompt, entry, SCORED) for prompt, entry in zip(asked, ENTRIES, strict=True)]
        found = [[*stream] for stream in streams]
    for stream, prompt, entry, tokens in zip(streams, asked, ENTRIES, found, strict=True):
        expected = logprobs(base, store, prompt + ids(tokens), entry)
        assert ids(stream.prompt) == prompt
        assert (stream.prompt[0].logprob, stream.prompt[0].top) == (None, ())
        agree(stream.prompt[1:], expected, 0)
        agree(tokens, expected, len(prompt) - 1)


def test_log_probabilities_are_those_of_training(serve: Serve, base: Base, store: AdapterStore) -> None:
    prompt = prompts(1, seed=4, longest=60)[0] * 3
    tokens = serve(activations="plain").generate([prompt], "a2", SCORED)[0]
    text = torch.tensor([prompt + ids(tokens)])
    with alone(base, store, "a2", trainable=True):
        logits = base.model.train()(text).logits
        base.model.eval()
        assert logits.requires_grad
        own = torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:], reduction="none")
    expected = (-own[len(prompt) - 1 :]).tolist()
    assert [token.logprob for token in tokens] == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_log_probabilities_are_those_of_training_on_quantised_weights(
    serve: Serve, base: Base, store: AdapterStore, weights: Weights
) -> None:
    prepare(base.model, weights)
    test_log_probabilities_are_those_of_training(serve, base, store)


def test_a_prompts_log_probabilities_survive_giving_way(
    serve: Serve, base: Base, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the prompt, and after some tokens of the answer."""
    engine = serve(max_step_tokens=8, num_speculative_tokens=0)
    cache, refused = engine._loop._cache, []
    reserve = cache.reserve

    def own(request, tokens: int) -> bool:
        if request.computed in (24, 43) and request.computed not in refused:
            refused.append(request.computed)
            return False
        return reserve(request, tokens)

    monkeypatch.setattr(cache, "reserve", own)
    prompt = prompts(1, seed=4, longest=1)[0] * 40
    stream = engine.submit(prompt, "a1", SCORED)
    tokens = [*stream]
    assert refused == [24, 43]
    expected = logprobs(base, store, prompt + ids(tokens), "a1")
    assert ids(stream.prompt) == prompt
    agree(stream.prompt[1:], expected, 0)
    agree(tokens, expected, len(prompt) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, CONTEXT])
def test_a_prompt_can_be_read_for_its_log_probabilities_only(
    serve: Serve, base: Base, store: AdapterStore, length: int
) -> None:
    prompt = [5 + i % 7 for i in range(length)]
    stream = serve().submit(prompt, "a0", SamplingParams(max_tokens=0, prompt_logprobs=1))
    assert [*stream] == []
    assert stream.finish == "length"
    assert ids(stream.prompt) == prompt
    expected = logprobs(base, store, prompt, "a0")
    for place, token in enumerate(stream.prompt[1:]):
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=ROUNDING)


# ---- 1: A mixed batch equals each row run alone; NaN next door changes nothing beyond rounding.


@pytest.mark.slow
def test_neighbours_change_nothing(serve: Serve) -> None:
    prompt, how = [5, 6, 7, 8], SamplingParams(max_tokens=12, ignore_eos=True, logprobs=0)
    alone_ = {str(entry): serve().generate([prompt], entry, how)[0] for entry in ENTRIES}
    engine = serve(max_rows=8)
    others = [engine.submit(own, {"a1": 1e38} if i % 3 == 0 else f"a{i % 4}", how) for i, own in enumerate(prompts(9))]
    beside = {str(entry): engine.submit(prompt, entry, how) for entry in ENTRIES}
    for entry, stream in beside.items():
        tokens = [*stream]
        assert ids(tokens) == ids(alone_[entry])
        expected = [token.logprob for token in alone_[entry]]
        assert [token.logprob for token in tokens] == pytest.approx(expected, abs=ROUNDING)
    for i, stream in enumerate(others):
        if i % 3 == 0:
            with pytest.raises(RequestError, match="NaN or Inf"):
                list(stream)
        else:
            assert len([*stream]) == 12


# ---- 7: No cache ever serves one adapter's state to another.


def test_a_folder_that_is_written_anew_at_the_same_path_is_another_adapter(
    serve: Serve, base: Base, store: AdapterStore
) -> None:
    """Neither its name nor its path says what it is."""
    engine, prompt = serve(), [7] * 65
    folder = store.folder / "mine"
    for seed in (1, 2):
        adapter(base.model, seed, 2).save(folder)
        assert ids(engine.generate([prompt], "mine", SamplingParams(max_tokens=8))[0]) == greedy(
            base, store, prompt, "mine", 8
        )
        assert engine.stats.prefix_hits == 0
    assert engine.generate([prompt], "mine", SamplingParams(max_tokens=8))
    assert engine.stats.prefix_hits == 64


def test_one_content_by_two_names_shares_its_prefixes(serve: Serve, store: AdapterStore) -> None:
    store.publish("same", store.find("a0").path)
    engine = serve()
    first, second = (engine.generate([[7] * 65], name, SamplingParams(max_tokens=8))[0] for name in ("a0", "same"))
    assert ids(first) == ids(second)
    assert engine.stats.prefix_hits == 64


def test_a_prefix_of_many_requests_is_computed_once(serve: Serve, base: Base, store: AdapterStore) -> None:
    engine = serve()
    system = prompts(1, seed=9, longest=1)[0] * 96
    asked = [[*system, *own] for own in prompts(4, seed=10, longest=20)]
    cached = []
    for prompt in asked:
        stream = engine.submit(prompt, "a1", SamplingParams(max_tokens=8))
        assert ids(stream) == greedy(base, store, prompt, "a1", 8)
        cached.append(stream.request.cached)
    assert cached == [0, 96, 96, 96]


def test_what_is_kept_of_numbers_that_are_none_stays_its_own(serve: Serve, base: Base, store: AdapterStore) -> None:
    engine, prompt = serve(), [7] * 65
    for _ in range(2):
        with pytest.raises(RequestError):
            engine.generate([prompt], {"a1": 1e38}, SamplingParams(max_tokens=8))
    assert ids(engine.generate([prompt], "a1", SamplingParams(max_tokens=8))[0]) == greedy(base, store, prompt, "a1", 8)
