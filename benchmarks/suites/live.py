"""An engine that trains beside its requests: what each takes from the other, on SmolLM2-135M.

    python -m benchmarks live [--rounds 5] [--dtypes float32 bfloat16] [--only streams training memory publish]

streams   8 streams with and without a job beside them, at a share of 0.2: time from token to token
training  a job without requests, against the same job in `loradeck train`: tokens per second
memory    the peak of both in one process, against that of each in a process of its own
publish   the time from a job's last step to the first answer of its adapter

The base is in float32, and also in bfloat16 if this CPU computes in it.
"""

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import CPU, Run, in_new_process, parser
from benchmarks.memory import MIB, peak
from benchmarks.models import SHAPES, RandomAdapters, save_random_base
from benchmarks.processes import take_turns, worker
from benchmarks.workloads import RATE
from loradeck import AdapterStore, Base, LoraConfig
from loradeck.base.load import SMOLLM2
from loradeck.base.onednn import cap_kernel_cache
from loradeck.cli.process import cap_allocator
from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.dtypes import computes_in
from loradeck.errors import UnknownAdapterError
from loradeck.live.config import LiveConfig
from loradeck.live.live_trainer import LiveTrainer
from loradeck.live.live_training import LiveTraining
from loradeck.live.records import JobRequest
from loradeck.lora.bank import Bank
from loradeck.runner.request import Finish, Request
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.train.config import TrainConfig
from loradeck.train.trainer import Trainer

PARTS = ("streams", "training", "memory", "publish")
DTYPES = ("float32", "bfloat16")
ROWS, PROMPT, ANSWER = 8, 64, 65
SEQUENCES, LENGTH = 8, 128  # of a step
LORA = LoraConfig(r=16, lora_alpha=32)
SHARE = LiveConfig(train_share=0.2)
# Room for the streams: all prompts are new, and the prefixes kept of one round after the other would only add up.
CONFIG = EngineConfig(max_rows=ROWS, num_speculative_tokens=0, kv_cache_bytes=64 << 20)
PASSES = 3  # a pass's peak is that of its largest batch, and the next passes reuse it
JOB = "job"
LARGER = "both / (larger alone + adapter, optimizer and cache)"

SUITE = Suite(
    "live",
    "Training beside requests",
    f"SmolLM2-135M, {ROWS} streams, a job of r=16 on all linear layers, {SEQUENCES} × {LENGTH} tokens a step",
    (
        Table(
            f"{ROWS} streams beside a job at a share of {SHARE.train_share}: time from token to token",
            ("streams {column}", "{row}"),
            (
                Figure("median beside / alone", "median, relative to without the job", "×", "≤ 1.35"),
                Figure("99th percentile beside / alone", "99th percentile, relative to without the job", "×", "≤ 2"),
                Figure("share of training", "the job's share of the time"),
            ),
        ),
        Table(
            "A job without requests",
            ("training {column}", "{row}"),
            (Figure("live / train", "tokens/s relative to `loradeck train`", "×", "≥ 0.95"),),
        ),
        Table(
            "Peak memory",
            ("memory {column}", "{row}"),
            (
                Figure(
                    LARGER,
                    "both, relative to the larger alone with the adapter, its optimizer and the KV cache added",
                    "×",
                    "≤ 1.1",
                ),
            ),
        ),
        Table(
            "A job's last step to its adapter's first answer",
            ("publish {column}", "{row}"),
            (Figure("last step to first answer (s)", "from the last step to the first token", target="≤ 1"),),
        ),
    ),
    f"""
- *streams*: in one process, {ROWS} greedy answers of {ANSWER} tokens to prompts of {PROMPT}, alone and beside the job,
  in turns; the times between the tokens of a stream, all rounds together. The base's weights are in blocks, as `serve`
  loads them; the job's other settings are the defaults. What the mean time grows by is the job's.
- *without requests*: a pass of the job in an engine that has nothing to serve, and one by the Trainer on packed
  weights, as `train` loads them; each in a process of its own, in turns.
- *memory*: resident, at its peak, while {ROWS} answers are given, {PASSES} passes are taken, or both.
""",
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=5, parts=PARTS, dtypes=DTYPES)
    options.set_defaults(dtypes=[*DTYPES] if computes_in(torch.bfloat16, CPU) else ["float32"])
    options.add_argument("--shape", choices=SHAPES, help="a base of random weights instead; no file is written")
    run = Run(SUITE, options, arguments)
    run.options.record &= not run.options.shape
    cap_kernel_cache()  # as `loradeck serve` does, with the next
    cap_allocator()
    measures = {"streams": streams, "training": training, "memory": memory, "publish": publish}
    with tempfile.TemporaryDirectory() as path:
        source = save_random_base(run.options.shape, Path(path, "base")) if run.options.shape else SMOLLM2
        for dtype in run.options.dtypes:
            for part in run.options.only:
                run.add(f"{part} {dtype}", measures[part](source, dtype, run.options.rounds))
    run.end()


# ---- a job


def passes(base: Base, bank: Bank, tokens: list[int]) -> Generator[None]:
    """Train an adapter without end; after each pass its tokens are added to `tokens`."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(3, len(base.tokenizer), (4 * SEQUENCES, LENGTH), generator=rng).tolist()
    examples = [Example(row, [UNSUPERVISED, *row[1:]]) for row in rows]
    bank.add(JOB, LORA, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(base, bank)
    config = TrainConfig(learning_rate=RATE, schedule="constant", batch_size=SEQUENCES, max_steps=1_000_000)
    trainer.add(JOB, examples, config)
    try:
        for _ in trainer:
            tokens.append(SEQUENCES * LENGTH)
            yield
    finally:
        bank.unload(JOB)


@contextmanager
def job(trainer: LiveTrainer) -> Iterator[list[int]]:
    """Train within the block; yield the tokens of each pass."""
    tokens: list[int] = []
    ended = threading.Event()
    trainer.join(JOB, passes(trainer.base, trainer.bank, tokens), lambda _: ended.set())
    try:
        yield tokens
    finally:
        trainer.leave(JOB)
        ended.wait()


def wait_for(condition: Callable[[], object], every: float = 0.001) -> None:
    while not condition():
        time.sleep(every)


# ---- what is measured


class Latencies:
    """An observer that keeps the seconds from each token to the next of its stream."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def admitted(self, request: Request) -> None:
        """Do nothing."""

    def token(self, request: Request, since: float) -> None:
        if request.generated > 1:  # the first token waits for its prompt
            self.seconds.append(since)

    def finished(self, request: Request, finish: Finish) -> None:
        """Do nothing."""


def prompts_of(base: Base) -> Iterator[list[list[int]]]:
    """Yield new prompts for each round of streams."""
    rng = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(3, len(base.tokenizer), (ROWS, PROMPT), generator=rng).tolist()


def streams(source: str | Path, dtype: str, rounds: int) -> dict[str, float]:
    latencies = Latencies()
    base = Base.load(source, dtype=dtype, weights="blocks")
    prompts, sampling = prompts_of(base), SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    alone: list[float] = []
    beside: list[float] = []
    with Engine(base, config=CONFIG, observer=latencies) as engine:
        trainer = LiveTrainer(engine, SHARE)
        engine.generate(next(prompts), sampling=sampling)  # packs and compiles
        for _ in range(rounds):
            latencies.seconds = alone
            engine.generate(next(prompts), sampling=sampling)
            latencies.seconds = beside
            with job(trainer) as tokens:
                wait_for(lambda tokens=tokens: tokens)
                engine.generate(next(prompts), sampling=sampling)
    figures = {
        f"{name}, {kind} (ms)": 1e3 * of(each)
        for name, each in (("alone", alone), ("beside", beside))
        for kind, of in (("median", statistics.median), ("99th percentile", percentile))
    }
    return figures | {
        "median beside / alone": statistics.median(beside) / statistics.median(alone),
        "99th percentile beside / alone": percentile(beside) / percentile(alone),
        "share of training": 1 - statistics.mean(alone) / statistics.mean(beside),
    }


def percentile(values: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


def training(source: str | Path, dtype: str, rounds: int) -> dict[str, float]:
    with worker(live_passes, source, dtype) as live, worker(train_passes, source, dtype) as plain:
        turns = {"live": live, "train": plain}
        take_turns(turns, 1)
        rates = {name: statistics.median(each) for name, each in take_turns(turns, rounds).items()}
    return {
        **{f"{name} (tokens/s)": rate for name, rate in rates.items()},
        "live / train": rates["live"] / rates["train"],
    }


def live_passes(source: str | Path, dtype: str) -> Callable[[], float]:
    """Return a turn of the job in an engine's thread, which returns its tokens per second."""
    cap_kernel_cache()
    trainer = LiveTrainer(Engine(Base.load(source, dtype=dtype, weights="blocks"), config=CONFIG))
    going = threading.Semaphore(0)
    times: list[float] = []

    def gated() -> Generator[None]:
        for _ in passes(trainer.base, trainer.bank, []):
            times.append(time.perf_counter())
            going.acquire()
            times.append(time.perf_counter())
            yield

    trainer.join(JOB, gated(), lambda _: None)
    wait_for(lambda: times)

    def turn() -> float:
        count = len(times)
        going.release()
        wait_for(lambda: len(times) > count + 1)
        return SEQUENCES * LENGTH / (times[-1] - times[-2])

    return turn


def train_passes(source: str | Path, dtype: str) -> Callable[[], float]:
    """Return a turn of the same job, by a Trainer."""
    base = Base.load(source, dtype=dtype, weights="packed")
    each = passes(base, Bank(base.model), [])

    def turn() -> float:
        begin = time.perf_counter()
        next(each)
        return SEQUENCES * LENGTH / (time.perf_counter() - begin)

    return turn


def memory(source: str | Path, dtype: str, rounds: int) -> dict[str, float]:  # noqa: ARG001
    peaks = {name: in_new_process(peak_of, source, dtype, name) for name in ("streams", "training", "both")}
    added = in_new_process(additions, source, dtype)
    larger = max(peaks["streams"], peaks["training"]) + added
    return {
        **{f"{name} (MiB)": mebibytes for name, mebibytes in peaks.items()},
        "adapter, optimizer and cache (MiB)": added,
        LARGER: peaks["both"] / larger,
    }


def peak_of(source: str | Path, dtype: str, name: str) -> float:
    """Return the MiB of a process at its peak while it serves, trains, or does both."""
    if name != "training":  # `train` has neither
        cap_kernel_cache()
        cap_allocator()

    def work() -> None:
        base = Base.load(source, dtype=dtype, weights="packed" if name == "training" else "blocks")
        if name == "training":
            each = passes(base, Bank(base.model), [])
            for _ in range(PASSES):
                next(each)
            return
        with Engine(base, config=CONFIG) as engine:
            sampling = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
            if name == "streams":
                engine.generate(next(prompts_of(base)), sampling=sampling)
                return
            with job(LiveTrainer(engine, SHARE)) as tokens:
                for prompts in prompts_of(base):
                    engine.generate(prompts, sampling=sampling)
                    if len(tokens) >= PASSES:
                        return

    return peak(work)


def additions(source: str | Path, dtype: str) -> float:
    """Return the MiB of an adapter with its gradient and optimizer, and of the keys and values of all streams."""
    base = Base.load(source, dtype=dtype, weights="blocks")
    adapter = RandomAdapters(base.model).make(0, LORA)
    trained = sum(parameter.numel() * parameter.element_size() for parameter in adapter.parameters())
    with Engine(base, config=CONFIG) as engine:
        cache = ROWS * (PROMPT + ANSWER) * engine._runner.token_bytes
    return (4 * trained + cache) / MIB


def publish(source: str | Path, dtype: str, rounds: int) -> dict[str, float]:
    """Train short jobs one after the other, and ask for each adapter until it answers."""
    base = Base.load(source, dtype=dtype, weights="blocks")
    rows = [{"prompt": f"{n}?", "completion": f"It is {n * n}."} for n in range(8)]
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as path:
        store = AdapterStore(Path(path, "store"))
        store.folder.mkdir()
        with Engine(base, store, CONFIG) as engine:
            live = LiveTraining(engine, Path(path, "live"))
            with live.uploads.upload("", "train.jsonl", "fine-tune") as upload:
                upload.write("\n".join(map(json.dumps, rows)).encode())
            for n in range(rounds):
                settings = {"r": LORA.r, "batch_size": 4, "max_steps": 3}
                record = live.create(
                    JobRequest(
                        owner="", model=base.name, training_file=upload.record.id, suffix=f"n{n}", settings=settings
                    )
                )
                wait_for(lambda record=record: live.jobs.get(record.id, "").steps >= 3)
                begin = time.perf_counter()
                seconds.append(first_answer(engine, record.name) - begin)
            live.close()
    return {"last step to first answer (s)": statistics.median(seconds)}


def first_answer(engine: Engine, name: str) -> float:
    """Ask until an adapter answers; return when it did."""
    while True:
        try:
            next(engine.stream([5, 6, 7], name, SamplingParams(max_tokens=1, ignore_eos=True)))
            return time.perf_counter()
        except UnknownAdapterError:
            time.sleep(0.001)
