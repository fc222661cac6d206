"""The server over HTTP against plain transformers, and the engine with many adapters, on SmolLM2-135M.

    python -m benchmarks serve [--rounds 3] [--dtypes float32 bfloat16] [--only streams registered crowded cold]

streams     `loradeck serve` in a process of its own: one client, and 16 at once, on the base and through adapters r=8
registered  S-LoRA's question: as many requests as the engine can take, with 5 and with 2,000 adapters in the store
crowded     twice as many adapters in use as fit, against all resident: time to the first token
cold        the first request to an adapter on disk, against one to a resident adapter

The base is in float32, and also in bfloat16 if this CPU computes in it; the parts but for streams take the last.
"""

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import CPU, Run, parser
from benchmarks.models import SHAPES, RandomAdapters, random_store, save_random_base
from benchmarks.processes import take_turns, worker
from benchmarks.systems import STEPS, Case, Transformers
from benchmarks.workloads import Arrival, popularity, trace
from loradeck import AdapterStore, Base, LoraConfig
from loradeck.base.load import SMOLLM2
from loradeck.base.onednn import cap_kernel_cache
from loradeck.dtypes import computes_in
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.serve.generation import Generation

ROWS, PROMPT, ANSWER = 16, 64, 1 + STEPS
REGISTERED, REQUESTS, EXPONENT = 2000, 96, 1.5
KINDS = ("base", "identical", "uniform", "zipf:1.5", "distinct")
PARTS = ("streams", "registered", "crowded", "cold")
DTYPES = ("float32", "bfloat16")
CONFIG = EngineConfig(max_rows=ROWS, num_speculative_tokens=0)
ALONE = "one stream"


def streams_table(dtype: str, alone: str = "", together: str = "") -> Table:
    """Return the table of a dtype, with the targets of its ratios."""
    return Table(
        f"Through the server in {dtype}",
        (f"streams {dtype}", "{row}"),
        (
            Figure(f"{ALONE} / transformers", "one stream on the base: tokens/s relative to transformers", "×", alone),
            Figure(
                "distinct / transformers",
                "16 streams of 16 adapters: tokens/s relative to transformers' 16 rows on the base",
                "×",
                together,
            ),
            Figure("distinct / base", "16 streams of 16 adapters: tokens/s relative to 16 on the base", "×"),
        ),
    )


SUITE = Suite(
    "serve",
    "Serving",
    "SmolLM2-135M, 16 rows, r=8, all linear layers",
    (
        streams_table("bfloat16", "≥ 3.5", "≥ 3"),
        streams_table("float32"),
        Table(
            "2,000 registered adapters",
            ("registered", "{row}"),
            (Figure("2,000 / 5", "2,000 adapters: tokens/s relative to 5 adapters", "×", "≥ 0.97"),),
        ),
        Table(
            "More adapters in use than fit: time to first token",
            ("crowded", "{row}"),
            (Figure("half / all resident", "half resident: time relative to all resident", "×", "≤ 3"),),
        ),
        Table(
            "First request to an adapter on disk: time to first token",
            ("cold", "{row}"),
            (Figure("cold - warm (ms)", "difference", target="≤ 50"),),
        ),
    ),
    f"""
- Without speculative decoding: what that gains depends on the text.
- *through the server*: `loradeck serve` with its other defaults, in a process of its own; clients stream completions by
  httpx, all at once. {PROMPT} tokens of prompt, new ones each time, and {ANSWER} of answer; tokens of answers per
  second from the first request to the last token, prompts included. Adapters as in Punica's workloads. transformers:
  plain `generate` on the base, in a process of its own, of as many rows.
- *registered*: S-LoRA's question, scaled down: {REQUESTS} requests at once, so that all rows are always taken; each
  adapter of r=4 by Zipf's law with exponent {EXPONENT}, from 5 or from 2,000 in the store, none of them loaded before.
- *more adapters than fit*: 32 adapters in use, with room for all and with room for 16; 1.2 requests a second.
- *on disk*: the file is in the operating system's page cache.
""",
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=3, parts=PARTS, dtypes=DTYPES)
    options.set_defaults(dtypes=[*DTYPES] if computes_in(torch.bfloat16, CPU) else ["float32"])
    options.add_argument("--seconds", type=float, default=20.0, help="of a trace of crowded")
    options.add_argument("--rate", type=float, default=1.2, help="requests per second of that trace")
    options.add_argument("--shape", choices=SHAPES, help="a base of random weights instead; no file is written")
    run = Run(SUITE, options, arguments)
    run.options.record &= not run.options.shape
    cap_kernel_cache()  # as `loradeck serve` does
    only, rounds = run.options.only, run.options.rounds
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        source = save_random_base(run.options.shape, folder / "base") if run.options.shape else SMOLLM2
        for dtype in run.options.dtypes if "streams" in only else ():
            run.add(f"streams {dtype}", streams(source, dtype, folder / dtype, rounds))
        base = Base.load(source, dtype=run.options.dtypes[-1], weights="blocks")
        if "registered" in only:
            run.add("registered", registered(base, folder / "many", rounds))
        if "crowded" in only:
            run.add("crowded", crowded(base, folder / "crowded", rounds, run.options.seconds, run.options.rate))
        if "cold" in only:
            run.add("cold", cold(base, folder / "cold", 10 * rounds))
    run.end()


# ---- through the server


class Stream(NamedTuple):
    """What a client saw of an answer."""

    tokens: int
    first: float
    """Seconds to its first token."""


def streams(source: str | Path, dtype: str, folder: Path, rounds: int) -> dict[str, float]:
    """Return tokens of answers per second, with the prompts' time; and the time to the first token."""
    base = Base.load(source, dtype=dtype)
    random_store(base.model, folder, count=ROWS, r=8, dtype=base.model.dtype)
    vocabulary, name_of_base = len(base.tokenizer), base.name
    del base
    rng = torch.Generator().manual_seed(0)
    first: defaultdict[str, list[float]] = defaultdict(list)

    def stream(url: str, name: str, models: Sequence[str]) -> float:
        prompts = torch.randint(3, vocabulary, (len(models), PROMPT), generator=rng).tolist()
        begin = time.perf_counter()
        answers = asyncio.run(complete(url, models, prompts))
        seconds = time.perf_counter() - begin
        assert all(answer.tokens == ANSWER for answer in answers), answers
        first[name] += [answer.first for answer in answers]
        return seconds

    with worker(Transformers, source, dtype) as transformers, server(source, dtype, folder) as url:
        clients = {ALONE: [name_of_base]} | {
            kind: [name_of_base] * ROWS if kind == "base" else [f"a{i}" for i in popularity(kind, ROWS)]
            for kind in KINDS
        }
        turns: dict[str, Callable[[], float]] = {
            **{name: partial(stream, url, name, models) for name, models in clients.items()},
            **{f"transformers, {case}": partial(transformers, "answer", case) for case in (Case(1), Case(ROWS))},
        }
        take_turns(turns, 1)  # packs and compiles
        first.clear()
        seconds = {name: statistics.median(each) for name, each in take_turns(turns, rounds).items()}
    rows = {ALONE: 1, f"transformers, {Case(1)}": 1}
    return {f"{name} (tokens/s)": rows.get(name, ROWS) * ANSWER / each for name, each in seconds.items()} | {
        f"{ALONE} / transformers": seconds[f"transformers, {Case(1)}"] / seconds[ALONE],
        "distinct / transformers": seconds[f"transformers, {Case(ROWS)}"] / seconds["distinct"],
        "distinct / base": seconds["base"] / seconds["distinct"],
        **{f"{name}, time to first token (ms)": 1e3 * statistics.median(first[name]) for name in (ALONE, "distinct")},
    }


async def complete(url: str, models: Sequence[str], prompts: Sequence[list[int]]) -> list[Stream]:
    """Stream a completion of each prompt, all at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:

        async def one(model: str, prompt: list[int]) -> Stream:
            body = {"model": model, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            begin = time.perf_counter()
            first, last = 0.0, ""
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    raise RuntimeError((await response.aread()).decode())
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - begin
                        last = line
            return Stream(json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"], first)

        return await asyncio.gather(*map(one, models, prompts))


@contextmanager
def server(source: str | Path, dtype: str, adapters: Path) -> Generator[str]:
    """Run `loradeck serve` without speculative decoding; yield its URL."""
    command = [sys.executable, "-m", "loradeck", "serve", str(source), "--adapters", str(adapters)]
    command += ["--dtype", dtype, "--port", "0", "--num-speculative-tokens", "0"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout
            url = re.search(r"http://[\d.:]+", process.stdout.readline())
            assert url, "the server has not started"
            yield url[0]
        finally:
            process.terminate()


# ---- arrivals


@dataclass
class Outcome:
    """What a trace took."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    """Seconds to each request's first token."""


def replay(engine: Engine, arrivals: Sequence[Arrival]) -> Outcome:
    """Send a trace's requests when they are due, and wait for all answers."""
    rng = torch.Generator().manual_seed(0)
    vocabulary = len(engine.base.tokenizer)
    prompts = [torch.randint(3, vocabulary, (arrival.prompt,), generator=rng).tolist() for arrival in arrivals]
    outcome = Outcome()
    readers: list[tuple[Generation, threading.Thread]] = []
    begin = time.monotonic()
    for arrival, prompt in zip(arrivals, prompts, strict=True):
        time.sleep(max(0.0, begin + arrival.at - time.monotonic()))
        params = SamplingParams(max_tokens=arrival.answer, ignore_eos=True)
        generation = engine.submit(prompt, f"a{arrival.adapter}", params)
        reader = threading.Thread(target=list, args=(generation,))
        reader.start()
        readers.append((generation, reader))
    for generation, reader in readers:
        reader.join()
        outcome.tokens += generation.request.generated
        outcome.first.append(generation.request.first_token - generation.request.arrived)
    outcome.seconds = time.monotonic() - begin
    return outcome


def registered(base: Base, folder: Path, rounds: int) -> dict[str, float]:
    """Return tokens per second with 5 and with 2,000 adapters in the store, all requests at once."""
    store, adapters = AdapterStore(folder), RandomAdapters(base.model)
    requested = {arrival.adapter for count in (5, REGISTERED) for arrival in zipf(count)}
    for i in range(REGISTERED):  # those that nobody requests are small: thousands take minutes to write
        paths = None if i in requested else [*adapters.shapes][:1]
        store.publish(f"a{i}", adapters.make(i, LoraConfig(r=4), dtype=torch.bfloat16, paths=paths))

    def answer(count: int) -> float:
        with Engine(base, store, CONFIG) as engine:
            outcome = replay(engine, zipf(count))
        return outcome.tokens / outcome.seconds

    turns = {count: partial(answer, count) for count in (5, REGISTERED)}
    take_turns(turns, 1)
    speed = {count: statistics.median(each) for count, each in take_turns(turns, rounds).items()}
    return {
        "5 adapters (tokens/s)": speed[5],
        f"{REGISTERED:,} adapters (tokens/s)": speed[REGISTERED],
        f"{REGISTERED:,} adapters: different ones": len({arrival.adapter for arrival in zipf(REGISTERED)}),
        f"{REGISTERED:,} / 5": speed[REGISTERED] / speed[5],
    }


def zipf(adapters: int) -> list[Arrival]:
    """Return requests that come at once, each to an adapter by Zipf's law, with lengths of 8 to 63 tokens."""
    rng = random.Random(0)
    lengths = [(rng.randrange(8, 64), rng.randrange(8, 64)) for _ in range(REQUESTS)]
    numbers = rng.choices(range(adapters), [(number + 1) ** -EXPONENT for number in range(adapters)], k=REQUESTS)
    return [Arrival(0.0, number, prompt, answer) for number, (prompt, answer) in zip(numbers, lengths, strict=True)]


def crowded(base: Base, folder: Path, rounds: int, seconds: float, rate: float) -> dict[str, float]:
    """Return the median milliseconds to the first token with 32 adapters in use: all resident, and room for 16."""
    store = random_store(base.model, folder, count=32, r=8, dtype=base.model.dtype)  # the engine's own dtype
    nbytes = store.find("a0").facts.nbytes
    first: dict[int, list[float]] = {32: [], 16: []}
    arrivals = trace(adapters=32, rate=rate, seconds=seconds)
    for _ in range(rounds):
        for room, times in first.items():
            with Engine(base, store, replace(CONFIG, adapter_bytes=nbytes * room)) as engine:
                for i in range(32):
                    engine.adapter_cache.load(f"a{i}")
                times += replay(engine, arrivals).first
    median = {room: statistics.median(times) for room, times in first.items()}
    return {
        "all resident (ms)": 1e3 * median[32],
        "half resident (ms)": 1e3 * median[16],
        "half / all resident": median[16] / median[32],
    }


def cold(base: Base, folder: Path, rounds: int) -> dict[str, float]:
    """Return the median milliseconds to an idle engine's first token: a resident adapter, and one on disk."""
    store = random_store(base.model, folder, count=rounds + 2, r=8)
    rng = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    with Engine(base, store, CONFIG) as engine:
        for i in range(rounds + 2):
            for each in times.values():
                prompt = torch.randint(3, len(base.tokenizer), (PROMPT,), generator=rng).tolist()
                begin = time.perf_counter()
                next(engine.submit(prompt, f"a{i}", SamplingParams(max_tokens=1)))
                each.append(time.perf_counter() - begin)
    median = {state: 1e3 * statistics.median(each[2:]) for state, each in times.items()}
    return {
        "warm (ms)": median["warm"],
        "cold (ms)": median["cold"],
        "cold - warm (ms)": median["cold"] - median["warm"],
    }
