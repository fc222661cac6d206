"""Rows of many clients on one base for pooling: batches, adapters, failures that stay alone, and the end."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.classifiers import make, wrapped
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from loradeck import AdapterStore, Base
from loradeck.errors import (
    BusyError,
    ConfigError,
    LogitsError,
    RequestError,
    RequestTimeoutError,
    RouteError,
    UnknownAdapterError,
)
from loradeck.serve.config import EngineConfig
from loradeck.serve.pooling_engine import PoolingEngine

# PEFT asks for an attribute of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TIMEOUT = 600.0  # seconds; only a deadlock takes as long
ROWS = [[5, 9, 33, 7], [8, 2, 90, 41, 17, 3], [250, 4, 6]]


@pytest.fixture
def base(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    make("bert", "classify", 2, 1).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return Base.load(tmp_path / "base", dtype="float32", device="cpu", task="classify")


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """Classifiers of 3 and 5 labels, and one whose values are so large that what it computes is infinite."""
    for name, labels in (("three", 3), ("five", 5), ("huge", 4)):
        wrapped("bert", "classify", labels, labels).save_pretrained(str(tmp_path / "store" / name))
    path = tmp_path / "store" / "huge" / "adapter_model.safetensors"
    tensors = {key: tensor * 1e38 if "lora_B" in key else tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def serve(base: Base, store: AdapterStore) -> Iterator[Callable[..., PoolingEngine]]:
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(PoolingEngine(base, store, EngineConfig(**settings)))


class Batches:
    """The batches of an engine, which wait until they may be computed."""

    def __init__(self, engine: PoolingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.waits, self.may_run = threading.Event(), threading.Event()
        runner = engine._loop._runner  # type: ignore[attr-defined]
        run = runner.run

        def gated(rows: Sequence[Any], entries: Sequence[Any]) -> list[Tensor]:
            self.waits.set()
            assert self.may_run.wait(TIMEOUT)
            self.sizes.append(len(rows))
            return run(rows, entries)

        monkeypatch.setattr(runner, "run", gated)


def load(engine: PoolingEngine, *names: str) -> None:
    for name in names:
        engine.adapter_cache.load(name)


def test_rows_of_different_adapters_are_one_batch(
    serve: Callable[..., PoolingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    load(engine, "three", "five")
    alone = [engine.submit([row], name)[0].result() for row, name in zip(ROWS, ("three", None, "five"), strict=True)]
    assert [len(each) for each in alone] == [3, 2, 5]
    batches = Batches(engine, monkeypatch)
    first = engine.submit([[1]])
    assert batches.waits.wait(TIMEOUT)  # the others come while it is computed
    together = [engine.submit([row], name)[0] for row, name in zip(ROWS, ("three", None, "five"), strict=True)]
    batches.may_run.set()
    first[0].result()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours.result(), theirs, rtol=1e-5, atol=1e-6)
    assert batches.sizes == [1, 3]


def test_a_batch_has_the_tokens_of_a_step_with_its_padding(
    serve: Callable[..., PoolingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve(max_step_tokens=20, max_rows=8)
    batches = Batches(engine, monkeypatch)
    answers = engine.submit([[1] * 30, [1] * 6, [2] * 2, [3] * 7, *[[4] * 2] * 10])
    batches.may_run.set()
    for answer in answers:
        answer.result()
    # The first is longer than a step; three rows are at most 6, two at most 10 tokens long.
    assert batches.sizes == [1, 2, 2, 8, 1]


def test_a_row_whose_result_is_infinite_fails_alone(
    serve: Callable[..., PoolingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    load(engine, "three", "huge")
    alone = engine.submit(ROWS[:1], "three")[0].result()
    batches = Batches(engine, monkeypatch)
    engine.submit([[1]])
    good, bad, other = (engine.submit(ROWS[:1], name)[0] for name in ("three", "huge", "three"))
    batches.may_run.set()
    with pytest.raises(LogitsError, match="NaN or Inf"):
        bad.result()
    assert bad.finish == "failed"
    for answer in (good, other):
        torch.testing.assert_close(answer.result(), alone, rtol=1e-5, atol=1e-6)


def test_a_row_that_cannot_be_computed_fails_alone(
    serve: Callable[..., PoolingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    load(engine, "three", "five")
    runner: Any = engine._loop._runner  # type: ignore[attr-defined]
    run = runner.run

    def broken(rows: Sequence[Any], entries: Sequence[Any]) -> list[Tensor]:
        if any(13 in row.tokens for row in rows):
            raise IndexError("thirteen")
        return run(rows, entries)

    monkeypatch.setattr(runner, "run", broken)
    good, bad, blend = (
        engine.submit([[1]])[0],
        engine.submit([[13]])[0],
        engine.submit([[1]], {"three": 1, "five": 1})[0],
    )
    assert len(good.result()) == 2
    with pytest.raises(RequestError, match="thirteen"):
        bad.result()
    with pytest.raises(RouteError, match="outputs cannot be blended"):
        blend.result()
    assert len(engine.submit([[1]], "five")[0].result()) == 5


def test_adapters_take_turns_in_little_memory(serve: Callable[..., PoolingEngine], store: AdapterStore) -> None:
    size = max(stored.facts.parameter_bytes for stored in store.latest())
    engine = serve(adapter_bytes=size + 1, patience=0.001)
    answers = [engine.submit([row], name)[0] for row in ROWS for name in ("three", "five")]
    assert [len(answer.result()) for answer in answers] == [3, 5] * 3
    assert engine.adapter_cache.evictions
    assert len(engine.adapter_cache.residents()) == 1


def test_what_cannot_be_computed_is_refused(serve: Callable[..., PoolingEngine], base: Base) -> None:
    engine = serve()
    for row, message in (([], "empty"), ([1] * 65, "at most 64"), ([260], "unknown token id 260"), ("a", "token ids")):
        with pytest.raises(ConfigError, match=message):
            engine.submit([row])  # type: ignore[list-item]
    with pytest.raises(UnknownAdapterError):
        engine.submit([[1]], "nobody")
    generating = Base(base.model, base.tokenizer, "tiny", "tiny", "")
    with pytest.raises(ConfigError, match="loaded for the task generate"):
        PoolingEngine(generating)


def test_a_full_queue(serve: Callable[..., PoolingEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve(max_waiting=1, max_rows=1)
    batches = Batches(engine, monkeypatch)
    answers = engine.submit([[1], [2], [3]])
    with pytest.raises(BusyError, match="requests are waiting"):
        engine.submit([[4]])
    batches.may_run.set()
    for answer in answers:
        assert bool(answer.result().isfinite().all())


def test_a_late_request(serve: Callable[..., PoolingEngine]) -> None:
    (answer,) = serve(timeout=1e-9).submit([[1]])  # late whenever the engine sees it
    with pytest.raises(RequestTimeoutError):
        answer.result()


def test_a_cancelled_row_and_a_cancelled_reader(
    serve: Callable[..., PoolingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve(max_rows=1)
    batches = Batches(engine, monkeypatch)
    first, second, third = engine.submit([[1], [2], [3]])

    async def read() -> Tensor:
        task = asyncio.ensure_future(wait(third))
        await asyncio.sleep(0)
        task.cancel()  # nobody reads any more, but the row is computed
        second.cancel()
        batches.may_run.set()
        return await first

    async def wait(answer: Any) -> Tensor:
        return await answer

    assert len(asyncio.run(read())) == 2
    with pytest.raises(BusyError, match="cancelled"):
        second.result()
    assert len(third.result()) == 2
    assert batches.sizes == [1, 1]


def test_the_end_answers_what_runs_and_refuses_the_rest(
    serve: Callable[..., PoolingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve()
    batches = Batches(engine, monkeypatch)
    (answer,) = engine.submit([[1]])
    batches.may_run.set()
    engine.drain(TIMEOUT)
    assert len(answer.result()) == 2
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit([[1]])


def test_the_base_is_not_changed(serve: Callable[..., PoolingEngine], base: Base) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    engine = serve()
    engine.submit(ROWS, "three")[0].result()
    engine.close()
    assert not any("forward" in vars(module) for module in base.model.modules())
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_names_of_labels_come_from_the_adapter(
    serve: Callable[..., PoolingEngine], tmp_path: Path, store: AdapterStore
) -> None:
    path = tmp_path / "store" / "three" / "adapter_model.safetensors"
    record = {"labels": json.dumps(["bad", "so-so", "good"])}
    save_file(load_file(path), path, {"format": "pt", "loradeck": json.dumps(record)})
    engine = serve()
    assert engine.submit([[1]], "three")[0].labels == ("bad", "so-so", "good")
    assert engine.submit([[1]], "five")[0].labels == ()
