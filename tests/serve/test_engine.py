"""What comes out of an engine is what each request alone would get, whoever comes, goes, waits or fails beside it."""

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import MODELS, VOCABULARY, adapter
from transformers import MambaConfig, MambaForCausalLM

from loradeck import AdapterStore, Bank, Base
from loradeck.errors import (
    AdapterError,
    BaseModelError,
    BusyError,
    ConfigError,
    LoradeckError,
    RequestError,
    UnknownAdapterError,
)
from loradeck.ops import dispatch
from loradeck.sampling import SamplingParams, Token
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.serve.stop_strings import StopFilter

from .conftest import fill, greedy, ids, logprobs, prompts, until

pytestmark = pytest.mark.slow

LONG = SamplingParams(max_tokens=16)
ENTRIES = [None, "a0", "a1", {"a2": 0.7, "a0": 0.3}, "a3", {"a1": -0.5}]
Serve = Callable[..., Engine]


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_generate_token_for_token(kind: str, make: Callable[[str], Base], tmp_path: Path) -> None:
    base = make(kind)
    store = fill(AdapterStore(tmp_path), base, kind)
    asked = prompts(10)
    entries = [ENTRIES[i % len(ENTRIES)] for i in range(10)]
    with Engine(base, store, EngineConfig(max_rows=4, max_step_tokens=16)) as engine:
        got = engine.generate(asked, entries, LONG)
        again = engine.generate(asked[::-1], entries[::-1], LONG)  # now with prefixes found, and in another order
        assert engine.stats.prefix_hits > 0
    expected = [greedy(base, store, prompt, entry) for prompt, entry in zip(asked, entries, strict=True)]
    assert [*map(ids, got)] == expected
    assert [*map(ids, again)][::-1] == expected


def test_the_base_is_left_as_it_was(serve: Serve, base: Base) -> None:
    before = base.model(torch.tensor([[5, 6, 7]])).logits
    implementation = base.model.config._attn_implementation
    engine = serve()
    engine.generate([[5, 6, 7]], "a0", LONG)
    assert base.model.config._attn_implementation == implementation
    assert torch.equal(base.model(torch.tensor([[5, 6, 7]])).logits, before)
    assert [p.data_ptr() for p in engine._runner.model.get_input_embeddings().parameters()] == [
        p.data_ptr() for p in base.model.get_input_embeddings().parameters()
    ]


def test_a_base_whose_rows_cannot_be_computed_side_by_side_is_refused(base: Base) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(BaseModelError, match="MambaForCausalLM cannot be served"):
        Engine(Base(model.eval(), base.tokenizer, "m", "m", "f"))


def test_rows_give_way_and_come_back(serve: Serve, base: Base, store: AdapterStore) -> None:
    """A budget for two short rows: whoever came last waits again when another outgrows its place."""
    engine = serve()
    asked = [prompt[:40] + [9] * 60 for prompt in prompts(6, seed=3)]
    entries = ["a0", None, "a1", "a2", "a0", None]
    engine.close()
    small = serve(kv_cache_bytes=engine._runner.token_bytes * 384)
    got = small.generate(asked, entries, SamplingParams(max_tokens=60, ignore_eos=True))
    assert all(len(tokens) == 60 for tokens in got)
    for prompt, entry, tokens in zip(asked, entries, got, strict=True):
        stop = next((i + 1 for i, token in enumerate(tokens) if token.id == 2), 60)
        assert ids(tokens)[:stop] == greedy(base, store, prompt, entry, 60)[:stop]


def test_prefixes_are_never_anothers(serve: Serve, base: Base, store: AdapterStore) -> None:
    """Law 7: the same tokens under another adapter, weight or version are other tokens."""
    engine = serve()
    prompt = prompts(1, seed=8, longest=1)[0] * 64
    entries = [None, "a0", {"a0": 0.5}, "a1", {"a0": 0.5, "a1": 0.5}]
    hits = []
    for entry in entries:
        assert ids(engine.generate([prompt], entry, LONG)[0]) == greedy(base, store, prompt, entry)
        hits.append(engine.stats.prefix_hits)
    assert hits == [0] * len(entries)
    store.publish("a0", adapter(base.model, 99, 2))
    assert ids(engine.generate([prompt], "a0", LONG)[0]) == greedy(base, store, prompt, "a0")
    assert engine.stats.prefix_hits == 0
    assert ids(engine.generate([prompt], "a0@1", LONG)[0]) == greedy(base, store, prompt, "a0@1")
    assert engine.stats.prefix_hits > 0


def test_a_version_published_meanwhile_is_for_those_that_come_after(
    serve: Serve, base: Base, store: AdapterStore
) -> None:
    engine = serve()
    old, prompt = greedy(base, store, [7, 8, 9], "a0", 100), [7, 8, 9]
    running = engine.submit(prompt, "a0", SamplingParams(max_tokens=100))
    first = next(running)
    store.publish("a0", adapter(base.model, 50, 3))
    new = greedy(base, store, prompt, "a0", 16)
    assert ids(engine.generate([prompt], "a0", LONG)[0]) == new != old[:16]
    assert [first.id, *ids(running)] == old


# ---- endings


def test_a_stop_token_is_told_and_ends(serve: Serve, base: Base) -> None:
    plain = ids(serve().generate([[5, 6, 7]], None, SamplingParams(max_tokens=20, ignore_eos=True))[0])
    stop = plain[4]
    stream = serve().submit([5, 6, 7], None, SamplingParams(max_tokens=20, stop_token_ids=frozenset({stop})))
    tokens = [*stream]
    at = plain.index(stop)
    assert ids(tokens) == plain[: at + 1]
    assert [token.ends for token in tokens] == [False] * at + [True]
    assert stream.finish == "stop"
    late = SamplingParams(max_tokens=20, min_tokens=10, stop_token_ids=frozenset({stop}))
    assert stop not in ids(serve().generate([[5, 6, 7]], None, late)[0])[:10]


def letters(base: Base) -> dict[int, float]:
    """A bias by which an answer has nothing but letters, each of them a token."""
    return dict.fromkeys(base.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"], 100.0)


def test_a_stop_string_ends_a_request_that_nobody_reads(
    serve: Serve, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    how = SamplingParams(max_tokens=30, logit_bias=letters(base))
    text = engine.submit([5, 6], None, how).text()
    run, steps = engine._runner.run, []
    monkeypatch.setattr(engine._runner, "run", lambda batch, cache: (steps.append(len(batch)), run(batch, cache))[1])
    for stop in (text[4], text[5:8], ["\0", text[9:11], text[20:25]]):
        before = min((text.partition(own)[0] for own in ([stop] if isinstance(stop, str) else stop)), key=len)
        end = min(text.index(own) + len(own) for own in ([stop] if isinstance(stop, str) else stop) if own in text)
        steps.clear()
        generation = engine.submit([5, 6], None, replace(how, stop=stop))
        assert until(lambda: generation.finish is not None)  # noqa: B023
        assert (generation.finish, generation.request.generated) == ("stop", end)
        assert steps == [1] * end  # one reads the prompt, each makes a token: none after the one that completes it
        assert generation.text() == before
    assert until(lambda: not engine.stats.running)


def test_stop_strings_of_characters_that_are_several_tokens(
    serve: Serve, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    script = base.tokenizer("é語xyz", add_special_tokens=False)["input_ids"]
    for user in ("sampler", "loop"):  # whatever the model says
        monkeypatch.setattr(
            f"loradeck.serve.{user}.next_tokens",
            lambda _, requests: [Token(script[request.generated]) for request in requests],
        )
    for stop, answer, count in (("語", "é", 5), ("語x", "é", 6), ("é", "", 2), ("\xe8", "é語xyz", len(script))):
        how = SamplingParams(max_tokens=len(script), stop=stop, ignore_eos=True)
        generation = engine.submit([5, 6], None, how)
        assert generation.text() == answer
        assert (generation.finish, generation.request.generated) == ("stop" if count < len(script) else "length", count)


def test_no_stop_string_ends_an_answer_before_its_least_tokens(serve: Serve, base: Base) -> None:
    engine = serve()
    how = SamplingParams(max_tokens=30, logit_bias=letters(base))
    text = engine.submit([5, 6], None, how).text()
    last = text[-1]
    for least in (0, text.index(last), text.rindex(last)):
        generation = engine.submit([5, 6], None, replace(how, stop=[last], min_tokens=least))
        end = text.index(last, least)
        assert generation.text() == text[:end]
        assert (generation.finish, generation.request.generated) == ("stop", end + 1)


def test_a_tokenizer_that_fails_fails_its_request_alone(
    serve: Serve, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    monkeypatch.setattr(StopFilter, "push", lambda *_: 1 / 0)
    failing = engine.submit([5, 6], None, SamplingParams(stop="x"))
    with pytest.raises(RequestError, match="division"):
        next(failing)
    assert ids(engine.generate([[5, 6]], None, LONG)[0]) == greedy(base, None, [5, 6])


@pytest.mark.parametrize("stop", [[""], "", [b"x"]])
def test_stop_strings_that_are_none_are_refused(stop: Any) -> None:
    with pytest.raises(ConfigError, match="stop="):
        SamplingParams(stop=stop)


def test_a_row_ends_at_the_context(serve: Serve, base: Base) -> None:
    stream = serve().submit([5] * 250, None, SamplingParams(max_tokens=100, ignore_eos=True))
    assert len([*stream]) == 6
    assert stream.finish == "length"


def test_a_cancelled_request_frees_its_row_and_ends(serve: Serve) -> None:
    engine = serve(max_rows=1)
    forever = SamplingParams(max_tokens=200, ignore_eos=True)
    running = engine.submit([5], "a0", forever)
    next(running)
    waiting = engine.submit([6], "a1", forever)
    waiting.cancel()
    running.cancel()
    assert len([*running]) < 200
    assert [*waiting] == []
    assert (running.finish, waiting.finish) == ("cancelled", "cancelled")
    assert ids(engine.generate([[7]], None, LONG)[0])
    assert until(lambda: engine.stats.running == engine.stats.waiting == 0)
    assert engine._loop._cache.row_bytes == 0
    assert all(not own.pinned for own in engine.adapter_cache.residents())


def test_a_cancelled_request_is_in_no_step_but_the_one_that_runs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve(max_rows=2)
    run, late = engine._runner.run, []

    def watched(batch, cache):
        late.extend(work.request for work in batch if work.request.cancelled)
        if gone and not gone[0].cancelled and gone[0].generated == 5:
            stream.cancel()  # while this step runs
        return run(batch, cache)

    gone: list = []
    monkeypatch.setattr(engine._runner, "run", watched)
    forever = SamplingParams(max_tokens=200, ignore_eos=True)
    stream, other = engine.submit([5], "a0", forever), engine.submit([6], None, forever)
    gone.append(stream.request)
    assert len([*stream]) == 6
    assert late == []
    assert len([*other]) == 200


# ---- chance


def test_a_seed_says_the_same_whoever_is_beside_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [5, 6, 7]

    def hot(seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=12, temperature=1.2, top_p=0.95, seed=seed, ignore_eos=True, frequency_penalty=0.1
        )

    answers = [*map(ids, serve().generate([prompt] * 3, "a1", [hot(seed) for seed in range(3)]))]  # n=3
    assert len({*map(tuple, answers)}) == 3
    engine = serve(max_rows=3, max_step_tokens=8, kv_cache_bytes=serve()._runner.token_bytes * 384)
    others = [engine.submit(own, f"a{i % 4}", hot(i)) for i, own in enumerate(prompts(6, seed=6))]
    streams = [engine.submit(prompt, "a1", hot(seed)) for seed in (2, 0, 1)]
    assert [ids(stream) for stream in streams] == [answers[2], answers[0], answers[1]]
    assert all(len([*other]) == 12 for other in others)


def test_chance_goes_on_where_it_was_after_giving_way(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = SamplingParams(max_tokens=12, temperature=1.2, seed=1, ignore_eos=True)
    expected = ids(serve().generate([[5, 6]], "a1", hot)[0])
    engine = serve()
    reserve, refused = engine._loop._cache.reserve, []

    def own(request, tokens: int) -> bool:
        if request.generated == 6 and not refused:
            refused.append(request)
            return False
        return reserve(request, tokens)

    monkeypatch.setattr(engine._loop._cache, "reserve", own)
    assert ids(engine.generate([[5, 6]], "a1", hot)[0]) == expected
    assert refused


def test_bias_and_penalties_reach_the_choice(serve: Serve, base: Base) -> None:
    plain = ids(serve().generate([[5, 6, 7]], None, SamplingParams(max_tokens=20, ignore_eos=True))[0])
    assert len({*plain}) < 20
    banned = SamplingParams(max_tokens=20, ignore_eos=True, logit_bias={plain[0]: float("-inf")})
    assert plain[0] not in ids(serve().generate([[5, 6, 7]], None, banned)[0])
    varied = SamplingParams(max_tokens=20, ignore_eos=True, presence_penalty=1000.0)
    assert len({*ids(serve().generate([[5, 6, 7]], None, varied)[0])}) == 20
    new = ids(
        serve().generate([[5, 6, 7]], None, SamplingParams(max_tokens=20, ignore_eos=True, repetition_penalty=1e9))[0]
    )
    assert not {*new} & {5, 6, 7}


# ---- failures


def test_an_adapter_that_cannot_be_loaded_fails_its_request_alone(
    serve: Serve, base: Base, store: AdapterStore
) -> None:
    engine = serve()
    broken = store.find("a3").path / "adapter_model.safetensors"
    content = bytearray(broken.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # NaN
    sound = engine.submit([5, 6], "a1", LONG)
    broken.write_bytes(content)
    failing = engine.submit([5, 6], "a3", LONG)
    with pytest.raises(AdapterError, match="NaN or Inf"):
        next(failing)
    assert failing.finish == "failed"
    assert ids(sound) == greedy(base, store, [5, 6], "a1")


def test_scores_that_are_no_numbers_fail_their_request_alone(serve: Serve, base: Base, store: AdapterStore) -> None:
    engine = serve()
    asked = prompts(3, seed=5)
    streams = [engine.submit(p, e, LONG) for p, e in zip(asked, ["a0", {"a1": 1e38}, None], strict=True)]
    with pytest.raises(RequestError, match="NaN or Inf"):
        [*streams[1]]
    assert ids(streams[0]) == greedy(base, store, asked[0], "a0")
    assert ids(streams[2]) == greedy(base, store, asked[2])
    assert ids(engine.generate([asked[1]], "a1", LONG)[0]) == greedy(base, store, asked[1], "a1")


def test_a_step_that_fails_fails_the_request_that_made_it(
    serve: Serve, base: Base, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    run = engine._runner.run

    def poisoned(batch, cache):
        if any(77 in work.request.prompt for work in batch):
            raise MemoryError("no memory for 77")
        return run(batch, cache)

    monkeypatch.setattr(engine._runner, "run", poisoned)
    streams = [engine.submit(prompt, "a0", LONG) for prompt in ([5, 6], [77], [8, 9])]
    with pytest.raises(RequestError, match="no memory for 77"):
        [*streams[1]]
    assert ids(streams[0]) == greedy(base, store, [5, 6], "a0")
    assert ids(streams[2]) == greedy(base, store, [8, 9], "a0")


def test_time_runs_out(serve: Serve) -> None:
    engine = serve(timeout=100)
    stream = engine.submit([5], None, SamplingParams(max_tokens=250, ignore_eos=True))
    stream.request.arrived -= 1000
    with pytest.raises(RequestError, match="not done within 100 s"):
        list(stream)


def test_time_runs_out_for_those_that_wait_too(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, submitted = serve(max_rows=1, timeout=1000), threading.Event()
    run = engine._runner.run
    # The first request's first step waits for the others.
    monkeypatch.setattr(engine._runner, "run", lambda *work: submitted.wait(120) and run(*work))
    streams = [engine.submit([5], None, SamplingParams(max_tokens=250, ignore_eos=True)) for _ in range(3)]
    assert until(lambda: streams[0].request.admitted > 0)
    for stream in streams:
        stream.request.arrived -= 2000
    submitted.set()
    for stream in streams:
        with pytest.raises(RequestError, match="not done within 1000 s"):
            list(stream)
    assert [stream.request.admitted > 0 for stream in streams] == [True, False, False]


# ---- what is refused


@pytest.mark.parametrize(
    ("tokens", "entry", "error"),
    [
        ([], None, ConfigError),
        ([VOCABULARY], None, ConfigError),
        ([-1], None, ConfigError),
        ([5] * 256, None, ConfigError),
        ([5], "nobody", UnknownAdapterError),
        ([5], {"a0": 1.0, "nobody": 1.0}, UnknownAdapterError),
        ([5], {"a0": float("nan")}, LoradeckError),
    ],
)
def test_what_cannot_be_is_refused_at_once(serve: Serve, tokens: list[int], entry: object, error: type) -> None:
    engine = serve()
    with pytest.raises(error):
        engine.submit(tokens, entry)
    assert engine._loop.live == []


def test_an_unknown_token_id_is_named(serve: Serve) -> None:
    with pytest.raises(ConfigError, match=rf"unknown token id {VOCABULARY}; the base has {VOCABULARY}\n"):
        serve().submit([5, VOCABULARY])


@pytest.mark.parametrize("prompt", ["text", [1.5], 5, None])
def test_a_prompt_that_is_not_token_ids_is_refused(serve: Serve, prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r"a prompt is a list of token ids\n.*loradeck\.base\.text\.encode"):
        serve().submit(prompt)


def test_an_adapter_beyond_the_budget_is_refused(serve: Serve) -> None:
    with pytest.raises(ConfigError, match=r"^a0@1 takes \d+ bytes, more than adapter_bytes=100\n"):
        serve(adapter_bytes=100).submit([5], "a0")


def test_a_full_queue_is_refused(serve: Serve) -> None:
    engine = serve(max_rows=1, max_waiting=2)
    forever = SamplingParams(max_tokens=200, ignore_eos=True)
    running = engine.submit([5], None, forever)
    next(running)
    waiting = [engine.submit([5], None, forever) for _ in range(2)]
    with pytest.raises(BusyError) as refused:
        engine.submit([5], None, forever)
    assert refused.value.retry_after >= 1
    for stream in (running, *waiting):
        stream.cancel()


def test_draining(serve: Serve) -> None:
    engine = serve()
    short, long = (
        engine.submit([5], None, LONG),
        engine.submit([5], None, SamplingParams(max_tokens=250, ignore_eos=True)),
    )
    engine.drain(600)
    assert short.finish in ("stop", "length")
    assert long.finish == "length"
    with pytest.raises(BusyError):
        engine.submit([5])


def test_draining_cancels_what_takes_too_long(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve()
    run = engine._runner.run
    monkeypatch.setattr(engine._runner, "run", lambda *work: time.sleep(0.05) or run(*work))
    stream = engine.submit([5], None, SamplingParams(max_tokens=250, ignore_eos=True))
    next(stream)
    engine.drain(0.01)
    assert stream.finish == "cancelled"


def test_closing_ends_everything(serve: Serve, base: Base) -> None:
    engine = serve()
    stream = engine.submit([5], "a0", SamplingParams(max_tokens=250, ignore_eos=True))
    next(stream)
    engine.close()
    assert len([*stream]) < 250
    assert stream.finish == "cancelled"
    Bank(base.model).detach()  # nothing of the engine is on the base


# ---- reading


def test_tasks_and_threads_read_streams(serve: Serve, base: Base, store: AdapterStore) -> None:
    engine = serve()
    expected = greedy(base, store, [5, 6], "a0")

    async def read() -> list[int]:
        return [token.id async for token in engine.stream([5, 6], "a0", LONG)]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(read() for _ in range(6)))

    assert asyncio.run(main()) == [expected] * 6
    assert asyncio.run(read()) == expected  # in another loop


# ---- memory


def views(place: int, size: int) -> int:
    """Tensors of this many bytes at this address. The test's adapters differ in size, so none of the others' is taken."""
    kinds = (torch.Tensor, torch.nn.Parameter)  # behind other classes there may be no memory
    tensors = [own for own in gc.get_objects() if type(own) in kinds]
    storages = [own.untyped_storage() for own in tensors if own.device.type == "cpu" and own.layout == torch.strided]
    return sum((own.data_ptr(), own.nbytes()) == (place, size) for own in storages)


def test_adapters_give_way_and_their_memory_comes_back(serve: Serve, base: Base, store: AdapterStore) -> None:
    nbytes = max(store.find(f"a{i}").facts.nbytes for i in range(4))
    engine = serve(adapter_bytes=2 * nbytes)
    bank = engine._runner.bank
    engine.generate([[5]], "a0", LONG)
    gone = weakref.ref(bank[store.find("a0").sha256()])
    storage = bank[store.find("a0").sha256()].flat_F32.untyped_storage()
    place, size = storage.data_ptr(), storage.nbytes()
    del storage
    assert views(place, size) >= 1
    for name in ("a1", "a2", "a3"):
        assert ids(engine.generate([[5, 6]], name, LONG)[0]) == greedy(base, store, [5, 6], name)
        assert engine.adapter_cache.nbytes <= 2 * nbytes
    gc.collect()
    assert gone() is None
    assert views(place, size) == 0  # no stack, cast or plan of the working sets holds on to its bytes
    assert engine.adapter_cache.evictions >= 2
    assert store.find("a0").sha256() not in bank
    assert ids(engine.generate([[5, 6]], "a0", LONG)[0]) == greedy(base, store, [5, 6], "a0")


def test_base_only_traffic_has_no_working_set(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:

    engine = serve()
    engine.generate([[5]], "a0", LONG)  # the adapter stays resident
    monkeypatch.setattr(dispatch, "lora", lambda *_, **__: pytest.fail("an update was computed for base rows"))
    assert engine.generate([[5]], None, LONG)[0]


def test_nothing_is_kept_of_requests_that_ended(serve: Serve) -> None:
    engine = serve()
    hot = SamplingParams(max_tokens=4, temperature=1.0, seed=1)
    engine.generate(prompts(12), [ENTRIES[i % 6] for i in range(12)], hot)
    assert until(lambda: not engine._loop.live)
    scheduler = engine._loop._scheduler
    assert (scheduler.running, scheduler._stored) == ([], {})
    assert (scheduler.waiting._members, scheduler.waiting._tenants, scheduler.waiting._deficits._credit) == ({}, {}, {})
    assert engine._loop._cache._rows == {}


# ---- all at once


@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_happens_every_answer_is_its_own(serve: Serve, base: Base, store: AdapterStore, seed: int) -> None:
    """A soak in small: little memory for anything, random requests, cancels, unloads and publishes."""
    chance = random.Random(seed)
    nbytes = store.find("a3").facts.nbytes
    engine = serve(adapter_bytes=2 * nbytes, patience=0.05)
    small = engine._runner.token_bytes * 600
    engine._loop._cache.budget = small
    asked = prompts(12, seed=seed, longest=50)
    sent = []
    for number in range(60):
        entry = chance.choice([None, "a0", "a1", "a2", "a3", {"a0": 0.5, "a1": 0.5}])
        pinned = {f"{name}@{store.find(name).version}": w for name, w in ({entry: 1.0} if isinstance(entry, str) else entry or {}).items()}  # fmt: skip
        prompt = chance.choice(asked)
        sent.append((prompt, pinned or None, engine.submit(prompt, pinned or None, LONG)))
        if chance.random() < 0.2:
            chance.choice(sent)[2].cancel()
        if chance.random() < 0.1:
            engine.adapter_cache.unload(f"a{chance.randrange(4)}")
        if chance.random() < 0.05:
            store.publish(f"a{number % 4}", adapter(base.model, 100 + number, 2 + number % 3))
        if chance.random() < 0.3:
            time.sleep(0.01)
    known: dict[str, list[int]] = {}
    for prompt, entry, stream in sent:
        tokens = ids(stream)
        label = f"{prompt}{entry}"
        if label not in known:
            known[label] = greedy(base, store, prompt, entry)
        assert tokens == (known[label] if stream.finish != "cancelled" else known[label][: len(tokens)])
    assert {stream.finish for *_, stream in sent} <= {"stop", "length", "cancelled"}
    assert engine._loop._cache.row_bytes == 0
    assert engine.adapter_cache.nbytes <= 2 * nbytes


@pytest.mark.parametrize("runner", ["compiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_pair_of_two_dtypes(base: Base, store: AdapterStore, dtype: torch.dtype, runner: str) -> None:
    """A in float32 and B in bfloat16, as some trainers write them: what its forward computes, on any base."""
    file = store.find("a1").path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor.bfloat16() if "lora_B" in key else tensor for key, tensor in tensors.items()}, file)
    narrow = replace(base, model=deepcopy(base.model).to(dtype))
    prompt = [*range(5, 25)]
    wanted = logprobs(narrow, store, prompt, "a1")[-1]
    config = EngineConfig(max_rows=4, max_step_tokens=16, enforce_eager=runner == "eager")
    with Engine(narrow, store, config) as engine:
        ((token,),) = engine.generate([prompt], ["a1"], SamplingParams(max_tokens=1, logprobs=5))
    assert len(token.top) == 5
    error = max(abs(value - wanted[i].item()) for i, value in token.top)
    assert error < (1e-4 if dtype == torch.float32 else 0.1)
