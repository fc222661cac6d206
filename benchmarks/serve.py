"""The engine against its own base and against PEFT's `generate`, in the same run on SmolLM2-135M.

The engine's base has packed weights, as `loradeck serve` has by default; PEFT's has them as they came.

    python -m benchmarks.serve [--rounds 3] [--dtypes bfloat16 float32]
        [--only streams prefill registered crowded cold]

streams     16 requests at once, 64 tokens of prompt, 32 of answer, adapters r=8 on all linear layers
prefill     the first token of 16 prompts of 64 tokens, and of one of 512, against transformers' and PEFT's `generate`
registered  S-LoRA's question: the same arrivals with 5 and with 2,000 adapters in the store
crowded     twice as many adapters in use as fit, against all resident: time to the first token
cold        the first request to an adapter on disk, against one to a resident adapter
"""

import argparse
import gc
import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

from benchmarks.record import RESULTS, in_turns, write
from benchmarks.workloads import Arrival, popularity, trace
from loradeck import AdapterStore, Bank, Base, LoraConfig
from loradeck.base.load import SMOLLM2
from loradeck.base.onednn import cap_kernel_cache
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.serve.generation import Generation

ROWS, PROMPT, ANSWER = 16, 64, 32
KINDS = ("base", "identical", "uniform", "zipf:1.5", "distinct")
PARTS = ("streams", "prefill", "registered", "crowded", "cold")
CONFIG = EngineConfig(max_rows=ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each trace")
    parser.add_argument("--rate", type=float, default=1.2, help="requests per second of each trace")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    arguments = parser.parse_args()
    cap_kernel_cache()  # as `loradeck serve` does
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in arguments.dtypes if {"streams", "prefill"} & {*arguments.only} else ():
            base = Base.load(SMOLLM2, dtype=dtype, weights="packed")
            store = made_store(base.model, Path(folder) / dtype, count=ROWS, r=8)
            if "streams" in arguments.only:
                figures[f"streams {dtype}"] = streams(base, store, arguments.rounds)
            if "prefill" in arguments.only:
                figures[f"prefill {dtype}"] = prefill(base, store, arguments.rounds)
            del base
            gc.collect()
        base = Base.load(SMOLLM2, dtype=arguments.dtypes[0], weights="packed")
        if "registered" in arguments.only:
            figures["registered"] = registered(base, Path(folder), arguments.rounds, arguments.seconds, arguments.rate)
        if "crowded" in arguments.only:
            figures["crowded"] = crowded(base, Path(folder), arguments.rounds, arguments.seconds, arguments.rate)
        if "cold" in arguments.only:
            figures["cold"] = cold(base, Path(folder), 10 * arguments.rounds)
    for part, own in figures.items():
        print(part, {name: round(value, 3) for name, value in own.items()})
    if tuple(arguments.only) != PARTS:  # the others stay as they were
        before = json.loads((RESULTS / "serve.json").read_text(encoding="utf-8"))["figures"]
        figures = {part: figures.get(part, own) for part, own in before.items()} | figures
    print(f"written: {write('serve', figures)}")


# ---- 16 at once


def streams(base: Base, store: AdapterStore, rounds: int) -> dict[str, float]:
    """Tokens of answers per second, prompts included in the time; and a step's time outside the model."""
    chance = torch.Generator().manual_seed(0)

    def prompts() -> list[list[int]]:  # new ones each time: none is in the prefix cache
        return torch.randint(3, 49000, (ROWS, PROMPT), generator=chance).tolist()

    folders = [store.find(f"a{i}").path for i in range(ROWS)]
    with peft(str(base.model.dtype).removeprefix("torch."), folders) as theirs, Engine(base, store, CONFIG) as engine:

        def ours(kind: str) -> Callable[[], object]:
            names = [None] * ROWS if kind == "base" else [f"a{i}" for i in popularity(kind, ROWS)]
            return lambda: engine.generate(prompts(), names, SamplingParams(max_tokens=ANSWER, ignore_eos=True))

        ways = {f"loradeck, {kind}": ours(kind) for kind in KINDS} | {"PEFT, distinct": lambda: theirs(prompts())}
        seconds = in_turns(ways, rounds)
        with timed(engine) as steps:
            ours("distinct")()
    rates = {f"{name} (tokens/s)": ROWS * ANSWER / own for name, own in seconds.items()}
    whole = [step for step in steps if step.rows == step.tokens == ROWS]
    return rates | {
        "distinct / base": seconds["loradeck, base"] / seconds["loradeck, distinct"],
        "loradeck / PEFT, distinct": seconds["PEFT, distinct"] / seconds["loradeck, distinct"],
        "decode step (ms)": 1e3 * statistics.median(step.seconds for step in whole),
        "of it outside the model": statistics.median(1 - step.model / step.seconds for step in whole),
    }


def prefill(base: Base, store: AdapterStore, rounds: int) -> dict[str, float]:
    """Milliseconds to the first token of all rows; new prompts each time, so that none is in the prefix cache."""
    chance = torch.Generator().manual_seed(1)
    folders = [store.find(f"a{i}").path for i in range(ROWS)]
    with peft(str(base.model.dtype).removeprefix("torch."), folders) as theirs, Engine(base, store, CONFIG) as engine:

        def asked(rows: int, length: int) -> dict[str, float]:
            def prompts() -> list[list[int]]:
                return torch.randint(3, 49000, (rows, length), generator=chance).tolist()

            def ours(names: Sequence[str | None]) -> object:
                return engine.generate(prompts(), names, SamplingParams(max_tokens=1, ignore_eos=True))

            ways: dict[str, Callable[[], object]] = {
                "loradeck, base": lambda: ours([None] * rows),
                "loradeck, distinct": lambda: ours([f"a{i}" for i in range(rows)]),
                "transformers, base": lambda: theirs(prompts(), tokens=1, adapted=False),
                "PEFT, distinct": lambda: theirs(prompts(), tokens=1),
            }
            seconds = in_turns(ways, rounds)
            ratios = {
                f"transformers / loradeck, {way}": seconds["transformers, base"] / seconds[f"loradeck, {way}"]
                for way in ("base", "distinct")
            }
            own = {f"{name} (ms)": 1e3 * each for name, each in seconds.items()} | ratios
            return {f"{rows} x {length}: {name}": value for name, value in own.items()}

        return asked(ROWS, PROMPT) | asked(1, 512)


@dataclass
class Step:
    """One step of an engine."""

    rows: int
    tokens: int
    model: float
    seconds: float = 0.0


@contextmanager
def timed(engine: Engine) -> Iterator[list[Step]]:
    """Time an engine's steps, and the model's part of them."""
    steps: list[Step] = []
    run, step = engine._runner.run, engine._loop._step

    def timed_run(batch: Any, cache: Any) -> Any:
        begun = time.perf_counter()
        scores = run(batch, cache)
        steps.append(Step(len(batch), sum(work.count for work in batch), time.perf_counter() - begun))
        return scores

    def timed_step() -> bool:
        begun = time.perf_counter()
        done = step()
        if done:
            steps[-1].seconds = time.perf_counter() - begun
        return done

    engine._runner.run, engine._loop._step = timed_run, timed_step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        engine._runner.run, engine._loop._step = run, step  # type: ignore[method-assign]


# ---- arrivals


@dataclass
class Outcome:
    """What became of a trace."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    """Seconds to each request's first token."""


def replay(engine: Engine, arrivals: Sequence[Arrival]) -> Outcome:
    """Send a trace's requests when they are due, and wait for all answers."""
    chance = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 49000, (own.prompt,), generator=chance).tolist() for own in arrivals]
    outcome = Outcome()
    waiting: list[tuple[Generation, threading.Thread]] = []
    begun = time.monotonic()

    for own, prompt in zip(arrivals, prompts, strict=True):
        time.sleep(max(0.0, begun + own.at - time.monotonic()))
        stream = engine.submit(prompt, f"a{own.adapter}", SamplingParams(max_tokens=own.answer, ignore_eos=True))
        reader = threading.Thread(target=list, args=(stream,))
        reader.start()
        waiting.append((stream, reader))
    for stream, reader in waiting:
        reader.join()
        outcome.tokens += stream.request.generated
        outcome.first.append(stream.request.first_token - stream.request.arrived)
    outcome.seconds = time.monotonic() - begun
    return outcome


def registered(base: Base, folder: Path, rounds: int, seconds: float, rate: float) -> dict[str, float]:
    """Tokens per second with 5 and with 2,000 adapters in the store, at one rate."""
    store = made_store(base.model, folder / "many", count=2000, r=4, dtype=torch.bfloat16)
    found: dict[int, list[Outcome]] = {5: [], 2000: []}
    for _ in range(rounds):
        for count, own in found.items():
            with Engine(base, store, CONFIG) as engine:
                own.append(replay(engine, trace(adapters=count, rate=rate, seconds=seconds)))
    speed = {count: statistics.median(own.tokens / own.seconds for own in each) for count, each in found.items()}
    first = {count: statistics.median(t for own in each for t in own.first) for count, each in found.items()}
    return {
        "requests per second": rate,
        "5 adapters (tokens/s)": speed[5],
        "2,000 adapters (tokens/s)": speed[2000],
        "2,000 / 5": speed[2000] / speed[5],
        "5 adapters, time to first token (ms)": 1e3 * first[5],
        "2,000 adapters, time to first token (ms)": 1e3 * first[2000],
    }


def crowded(base: Base, folder: Path, rounds: int, seconds: float, rate: float) -> dict[str, float]:
    """Median milliseconds to the first token, 32 adapters in use: all resident, and with room for 16."""
    store = made_store(base.model, folder / "crowd", count=32, r=8, dtype=base.model.dtype)  # as the engine keeps them
    nbytes = store.find("a0").facts.nbytes
    found: dict[int, list[float]] = {32: [], 16: []}
    arrivals = trace(adapters=32, rate=rate, seconds=seconds)
    for _ in range(rounds):
        for room, own in found.items():
            with Engine(base, store, EngineConfig(max_rows=ROWS, adapter_bytes=nbytes * room)) as engine:
                for i in range(32):
                    engine.residency.load(f"a{i}")
                own += replay(engine, arrivals).first
    median = {room: statistics.median(own) for room, own in found.items()}
    return {
        "all resident (ms)": 1e3 * median[32],
        "half resident (ms)": 1e3 * median[16],
        "half / all resident": median[16] / median[32],
    }


def cold(base: Base, folder: Path, rounds: int) -> dict[str, float]:
    """Median milliseconds from asking an idle engine to the first token: a resident adapter, and one on disk."""
    store = made_store(base.model, folder / "cold", count=rounds + 2, r=8)
    chance = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {"warm": [], "cold": []}
    with Engine(base, store, CONFIG) as engine:
        for i in range(rounds + 2):
            for state, own in (("cold", f"a{i}"), ("warm", f"a{i}")):
                prompt = torch.randint(3, 49000, (PROMPT,), generator=chance).tolist()
                begun = time.perf_counter()
                next(engine.submit(prompt, own, SamplingParams(max_tokens=1)))
                if i > 1:
                    times[state].append(time.perf_counter() - begun)
    median = {state: 1e3 * statistics.median(own) for state, own in times.items()}
    return {
        "warm (ms)": median["warm"],
        "cold (ms)": median["cold"],
        "cold - warm (ms)": median["cold"] - median["warm"],
    }


# ---- what is served


def made_store(
    model: nn.Module, folder: Path, *, count: int, r: int, dtype: torch.dtype = torch.float32
) -> AdapterStore:
    """A store of adapters on all linear layers, a0 to a{count - 1}; beyond 16 they differ in one number."""
    store = AdapterStore(folder)
    bank = Bank(model)
    for i in range(min(count, ROWS)):
        adapter = bank.add("made", LoraConfig(r=r), generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            for parameter in bank.parameters("made"):
                if parameter.shape[1] == r:
                    nn.init.normal_(parameter, std=0.02)
        adapter.to(dtype)
        store.publish(f"a{i}", adapter)
        bank.unload("made")
    bank.detach()
    for i in range(ROWS, count):
        path = folder / "new"
        shutil.copytree(store.find(f"a{i % ROWS}").path, path)
        tensors = path / "adapter_model.safetensors"
        content = bytearray(tensors.read_bytes())
        content[-4:-2] = i.to_bytes(2, "little")  # the low bits of one number
        tensors.write_bytes(content)
        store.publish(f"a{i}", path)
        shutil.rmtree(path)
    return store


@contextmanager
def peft(dtype: str, folders: list[Path]) -> Iterator[Callable[..., None]]:
    """PEFT's `generate` for prompts, the i-th through the i-th of these adapters, or transformers' on the base.

    It is a process of its own: two threads of one that both compute slow each other down, even in turns.
    """
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=generate_with_peft, args=(far, dtype, folders), daemon=True)
    process.start()

    def ask(prompts: list[list[int]], *, tokens: int = ANSWER, adapted: bool = True) -> None:
        near.send((prompts, tokens, adapted))
        near.recv()

    try:
        near.recv()  # it is ready
        yield ask
    finally:
        near.send(None)
        process.join()


def generate_with_peft(pipe: Connection, dtype: str, folders: list[Path]) -> None:
    """Answer each (prompts, new tokens, whether through adapters) that comes through a pipe, until None comes."""
    model = PeftModel.from_pretrained(Base.load(SMOLLM2, dtype=dtype).model, folders[0], adapter_name="a0").eval()
    for i, path in enumerate(folders[1:], start=1):
        model.load_adapter(str(path), adapter_name=f"a{i}")
    pipe.send("ready")
    while asked := pipe.recv():
        prompts, tokens, adapted = asked
        ids = torch.tensor(prompts)
        settings = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=2
        )
        given: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": settings}
        with torch.inference_mode():
            if adapted:
                model.generate(**given, adapter_names=[f"a{i}" for i in range(len(prompts))])
            else:
                with model.disable_adapter():
                    model.generate(**given)
        pipe.send("done")


if __name__ == "__main__":
    main()
