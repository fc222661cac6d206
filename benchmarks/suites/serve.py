"""The engine against its own base and against PEFT's `generate`, in the same run on SmolLM2-135M.

The engine's base has packed weights, the default of `loradeck serve`; PEFT's has plain ones.

    python -m benchmarks serve [--rounds 3] [--dtypes bfloat16 float32]
        [--only streams prefill registered crowded cold]

streams     16 requests at once, 64 tokens of prompt, 32 of answer, adapters r=8 on all linear layers
prefill     the first token of 16 prompts of 64 tokens, and of one of 512, against transformers' and PEFT's `generate`
registered  S-LoRA's question: the same arrivals with 5 and with 2,000 adapters in the store
crowded     twice as many adapters in use as fit, against all resident: time to the first token
cold        the first request to an adapter on disk, against one to a resident adapter
"""

import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.figures import PERCENT, Figure, Suite, Table
from benchmarks.harness import Run, alternate, parser
from benchmarks.models import random_store
from benchmarks.processes import worker
from benchmarks.steps import decode_steps, timed
from benchmarks.workloads import Arrival, greedy, popularity, trace
from loradeck import AdapterStore, Base
from loradeck.base.load import SMOLLM2
from loradeck.base.onednn import cap_kernel_cache
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.serve.generation import Generation

ROWS, PROMPT, ANSWER = 16, 64, 32
REGISTERED = 2000
KINDS = ("base", "identical", "uniform", "zipf:1.5", "distinct")
PARTS = ("streams", "prefill", "registered", "crowded", "cold")
DTYPES = ("bfloat16", "float32")
CONFIG = EngineConfig(max_rows=ROWS)
PROMPTS = {f"{ROWS} x {PROMPT}": (ROWS, PROMPT), "1 x 512": (1, 512)}


def prefill_figures() -> list[Figure]:
    return [
        Figure(
            f"{prompts}: transformers / loradeck, {adapters}",
            f"first token of {prompts} tokens, {through}: times faster than transformers on the base",
            "×",
            "≥ 1.5" if adapters == "distinct" else "",
        )
        for prompts in PROMPTS
        for adapters, through in (("base", "base"), ("distinct", "one adapter per prompt"))
    ]


SUITE = Suite(
    "serve",
    "Serving",
    "SmolLM2-135M, 16 rows, r=8, all linear layers",
    (
        Table(
            "Streams",
            ("streams {column}", "{row}"),
            (
                Figure(
                    "distinct / base", "16 different adapters: tokens/s relative to the base's streams", "×", "≥ 0.7"
                ),
                Figure("loradeck / PEFT, distinct", "16 different adapters: tokens/s relative to PEFT", "×", "≥ 6"),
                Figure("of it outside the model", "share of a decode step outside the model", PERCENT, "< 0.1"),
            ),
        ),
        Table("First token", ("prefill {column}", "{row}"), tuple(prefill_figures())),
        Table(
            "2,000 registered adapters",
            ("registered", "{row}"),
            (Figure("2,000 / 5", "2,000 adapters: tokens/s relative to 5 adapters", "×", "≥ 0.95"),),
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
    """
- *streams*: 64 tokens of prompt and 32 of answer, all at once; tokens of answers per second; workloads as Punica's.
  PEFT: transformers' `generate` with `adapter_names`, in a process of its own.
- *first token*: new prompts each time; transformers' `generate` of one token, in the same process as PEFT's.
- *registered*: S-LoRA's question, scaled down: the same Gamma arrivals, adapters of r=4 drawn evenly from 5 or from
  2,000 in the store; with 2,000, most requests are the first to their adapter.
- *more adapters than fit*: 32 adapters in use, with room for all and with room for 16; 1.2 requests a second.
- *on disk*: the file is in the operating system's page cache.
""",
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=3, parts=PARTS, dtypes=DTYPES)
    options.add_argument("--seconds", type=float, default=40.0, help="of each trace")
    options.add_argument("--rate", type=float, default=1.2, help="requests per second of each trace")
    run = Run(SUITE, options, arguments)
    cap_kernel_cache()  # as `loradeck serve` does
    only, rounds = run.options.only, run.options.rounds
    timing = rounds, run.options.seconds, run.options.rate
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for dtype in run.options.dtypes if {"streams", "prefill"} & {*only} else ():
            base = Base.load(SMOLLM2, dtype=dtype, weights="blocks")
            store = random_store(base.model, folder / dtype, count=ROWS, r=8)
            if "streams" in only:
                run.add(f"streams {dtype}", streams(base, store, rounds))
            if "prefill" in only:
                run.add(f"prefill {dtype}", prefill(base, store, rounds))
            del base
            gc.collect()
        base = Base.load(SMOLLM2, dtype=run.options.dtypes[0], weights="blocks")
        if "registered" in only:
            run.add("registered", registered(base, folder / "many", *timing))
        if "crowded" in only:
            run.add("crowded", crowded(base, folder / "crowded", *timing))
        if "cold" in only:
            run.add("cold", cold(base, folder / "cold", 10 * rounds))
    run.end()


# ---- 16 at once


def streams(base: Base, store: AdapterStore, rounds: int) -> dict[str, float]:
    """Return tokens of answers per second, with the prompts' time; and the share of a step outside the model."""
    rng = torch.Generator().manual_seed(0)

    def prompts() -> list[list[int]]:  # new ones each time: none is in the prefix cache
        return torch.randint(3, 49000, (ROWS, PROMPT), generator=rng).tolist()

    folders = [store.find(f"a{i}").path for i in range(ROWS)]
    dtype = str(base.model.dtype).removeprefix("torch.")
    with worker(peft, dtype, folders) as peft_generate, Engine(base, store, CONFIG) as engine:

        def ours(kind: str) -> Callable[[], object]:
            names = [None] * ROWS if kind == "base" else [f"a{i}" for i in popularity(kind, ROWS)]
            return lambda: engine.generate(prompts(), names, SamplingParams(max_tokens=ANSWER, ignore_eos=True))

        runs = {f"loradeck, {kind}": ours(kind) for kind in KINDS}
        seconds = alternate(runs | {"PEFT, distinct": lambda: peft_generate(prompts())}, rounds)
        with timed(engine) as steps:
            ours("distinct")()
    rates = {f"{name} (tokens/s)": ROWS * ANSWER / each for name, each in seconds.items()}
    whole = decode_steps(steps, ROWS)
    return rates | {
        "distinct / base": seconds["loradeck, base"] / seconds["loradeck, distinct"],
        "loradeck / PEFT, distinct": seconds["PEFT, distinct"] / seconds["loradeck, distinct"],
        "decode step (ms)": 1e3 * statistics.median(period for _, period in whole),
        "of it outside the model": statistics.median(1 - (step.end - step.begin) / period for step, period in whole),
    }


def prefill(base: Base, store: AdapterStore, rounds: int) -> dict[str, float]:
    """Return the milliseconds to the first token of all rows; new prompts each time miss the prefix cache."""
    rng = torch.Generator().manual_seed(1)
    folders = [store.find(f"a{i}").path for i in range(ROWS)]
    figures: dict[str, float] = {}
    dtype = str(base.model.dtype).removeprefix("torch.")
    with worker(peft, dtype, folders) as peft_generate, Engine(base, store, CONFIG) as engine:

        def first_tokens(rows: int, length: int) -> dict[str, float]:
            def prompts() -> list[list[int]]:
                return torch.randint(3, 49000, (rows, length), generator=rng).tolist()

            def ours(names: Sequence[str | None]) -> object:
                return engine.generate(prompts(), names, SamplingParams(max_tokens=1, ignore_eos=True))

            runs: dict[str, Callable[[], object]] = {
                "loradeck, base": lambda: ours([None] * rows),
                "loradeck, distinct": lambda: ours([f"a{i}" for i in range(rows)]),
                "transformers, base": lambda: peft_generate(prompts(), 1, False),
                "PEFT, distinct": lambda: peft_generate(prompts(), 1),
            }
            return alternate(runs, rounds)

        for name, (rows, length) in PROMPTS.items():
            seconds = first_tokens(rows, length)
            figures |= {f"{name}: {run} (ms)": 1e3 * each for run, each in seconds.items()}
            for adapters in ("base", "distinct"):
                ratio = seconds["transformers, base"] / seconds[f"loradeck, {adapters}"]
                figures[f"{name}: transformers / loradeck, {adapters}"] = ratio
    return figures


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
    prompts = [torch.randint(3, 49000, (arrival.prompt,), generator=rng).tolist() for arrival in arrivals]
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


def registered(base: Base, folder: Path, rounds: int, seconds: float, rate: float) -> dict[str, float]:
    """Return tokens per second with 5 and with 2,000 adapters in the store, at one rate."""
    store = random_store(base.model, folder, count=REGISTERED, r=4, dtype=torch.bfloat16)
    outcomes: dict[int, list[Outcome]] = {5: [], REGISTERED: []}
    for _ in range(rounds):
        for count, results in outcomes.items():
            with Engine(base, store, CONFIG) as engine:
                results.append(replay(engine, trace(adapters=count, rate=rate, seconds=seconds)))
    speed = {count: statistics.median(each.tokens / each.seconds for each in own) for count, own in outcomes.items()}
    first = {count: statistics.median(t for each in own for t in each.first) for count, own in outcomes.items()}
    return {
        "requests per second": rate,
        "5 adapters (tokens/s)": speed[5],
        f"{REGISTERED:,} adapters (tokens/s)": speed[REGISTERED],
        f"{REGISTERED:,} / 5": speed[REGISTERED] / speed[5],
        "5 adapters, time to first token (ms)": 1e3 * first[5],
        f"{REGISTERED:,} adapters, time to first token (ms)": 1e3 * first[REGISTERED],
    }


def crowded(base: Base, folder: Path, rounds: int, seconds: float, rate: float) -> dict[str, float]:
    """Return the median milliseconds to the first token with 32 adapters in use: all resident, and room for 16."""
    store = random_store(base.model, folder, count=32, r=8, dtype=base.model.dtype)  # the engine's own dtype
    nbytes = store.find("a0").facts.nbytes
    first: dict[int, list[float]] = {32: [], 16: []}
    arrivals = trace(adapters=32, rate=rate, seconds=seconds)
    for _ in range(rounds):
        for room, times in first.items():
            with Engine(base, store, EngineConfig(max_rows=ROWS, adapter_bytes=nbytes * room)) as engine:
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
                prompt = torch.randint(3, 49000, (PROMPT,), generator=rng).tolist()
                begin = time.perf_counter()
                next(engine.submit(prompt, f"a{i}", SamplingParams(max_tokens=1)))
                each.append(time.perf_counter() - begin)
    median = {state: 1e3 * statistics.median(each[2:]) for state, each in times.items()}
    return {
        "warm (ms)": median["warm"],
        "cold (ms)": median["cold"],
        "cold - warm (ms)": median["cold"] - median["warm"],
    }


# ---- adapters and PEFT


def peft(dtype: str, folders: Sequence[Path]) -> Callable[..., None]:
    """Return PEFT's `generate` for prompts, the i-th through the i-th of these adapters, or transformers' on the base.

    In a process of its own.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(Base.load(SMOLLM2, dtype=dtype).model, folders[0], adapter_name="a0").eval()
    for i, path in enumerate(folders[1:], start=1):
        model.load_adapter(str(path), adapter_name=f"a{i}")

    def run(prompts: list[list[int]], tokens: int = ANSWER, adapters: bool = True) -> None:
        if adapters:
            greedy(model, prompts, tokens, adapter_names=[f"a{i}" for i in range(len(prompts))])
        else:
            with model.disable_adapter():
                greedy(model, prompts, tokens)

    return run
