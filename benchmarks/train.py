"""Training speed, memory, many jobs at once and time to the first step, against PEFT in the same run on SmolLM2-135M.

    python -m benchmarks.train [--only speed memory jobs start] [--steps 12] [--rounds 3] [--sequences 8]
    python -m benchmarks.train --quick

Adapters: r=16 on all linear layers (210 modules). Examples: docstrings of Python's library, as answers to what a
function does, 48 to 512 tokens each with the prompt, which is masked; 8 of them a step.
"""

import argparse
import gc
import importlib
import inspect
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapters import show
from benchmarks.peft_train import Hosted, Plain
from benchmarks.record import in_turns, write
from loradeck import Bank, Base, LoraConfig
from loradeck.dataset.example import Example
from loradeck.dataset.record import Completion
from loradeck.train.batching import BatchSampler
from loradeck.train.config import TrainConfig
from loradeck.train.events import AnyEvent, Step
from loradeck.train.trainer import Trainer

PARTS = ("speed", "memory", "jobs", "start")
OURS, PLAIN, HOSTED = "loradeck", "PEFT, plain loop", "PEFT, transformers' Trainer"
LONGEST, RATE, JOBS = 512, 1e-4, 8
# Losses of one step, between the systems. Padded and packed rows round differently, and Adam's first steps are as long
# for a small gradient as for a large one: after one of them bf16's rounding shows.
MEMORY_STEPS = 3  # a step's peak is that of its longest documents, and the next steps reuse it
CLOSE = {"float32": 1e-3, "bfloat16": 3e-2}
MODULES = (
    "argparse bisect calendar collections csv datetime difflib fractions functools heapq inspect json os pathlib "
    "random re shutil statistics string tempfile textwrap zipfile"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8, help="of a step")
    parser.add_argument(
        "--quick", action="store_true", help="a little of each, to see that it works; nothing is written"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.dtypes, arguments.steps, arguments.rounds, arguments.sequences = ["float32"], 2, 1, 1
    sequences = arguments.sequences
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter = make_adapter(Path(folder) / "start")
        for dtype in arguments.dtypes:
            if "speed" in arguments.only:
                figures[f"speed {dtype}"] = speed(dtype, adapter, arguments.steps, sequences)
                gc.collect()
            if "memory" in arguments.only:
                figures[f"memory {dtype}"] = memory(dtype, adapter, min(MEMORY_STEPS, arguments.steps), sequences)
        if "jobs" in arguments.only:
            for each in sorted({1, max(1, sequences // 2)}):
                figures[f"{JOBS} jobs, {each} sequences a step each"] = jobs(each, adapter, arguments.rounds)
                gc.collect()
        if "start" in arguments.only:
            figures["start"] = start(arguments.rounds)
    if not arguments.quick and len(arguments.only) == len(PARTS):
        print(f"written: {write('train', figures)}")


def make_adapter(folder: Path) -> Path:
    """Save the adapter that all systems begin with."""
    bank = Bank(Base.load("smollm2-135m", dtype="float32").model)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    bank.add("start", lora, generator=torch.Generator().manual_seed(0))
    return bank.save("start", folder)


def docstrings(base: Base) -> list[Example]:
    """What a function of Python's library does, in its own words."""
    records = [
        Completion(
            f"What does Python's {module}.{name}({', '.join(inspect.signature(function).parameters)}) do?",
            inspect.cleandoc(text),
        )
        for module in MODULES.split()
        for name, function in inspect.getmembers(importlib.import_module(module), inspect.isfunction)
        if function.__module__ == module and not name.startswith("_") and (text := function.__doc__)
    ]
    return [Example.of(record, base.tokenizer, LONGEST) for record in records]


def ours(
    base: Base, adapter: Path, datasets: Sequence[Sequence[Example]], sequences: int, steps: int
) -> Iterator[float]:
    """Make one pass at a time, with a job for each dataset; yield the loss of the last job's step."""
    losses: list[float] = []

    def hear(event: AnyEvent) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)

    bank = Bank(base.model)
    trainer = Trainer(base, bank, on_event=hear)
    config = TrainConfig(
        learning_rate=RATE, schedule="constant", warmup_ratio=0, batch_size=sequences, max_steps=steps, seed=0
    )
    for n, examples in enumerate(datasets):
        trainer.add(bank.load(adapter, f"job {n}", trainable=True), examples, config)
    return (losses[-1] for _ in trainer)


def speed(dtype: str, adapter: Path, count: int, sequences: int) -> dict[str, float]:
    """Tokens per second, padding not counted: the systems take turns after each step, all on the same examples."""
    bases = [Base.load("smollm2-135m", dtype=dtype) for _ in range(3)]
    examples = docstrings(bases[0])
    order = BatchSampler(examples, sequences, seed=0)
    steps = [order[n] for n in range(count + 1)]  # the first is to warm up
    own, plain = ours(bases[0], adapter, [examples], sequences, len(steps)), Plain(bases[1].model, adapter, RATE)
    seconds: dict[str, list[float]] = {OURS: [], PLAIN: [], HOSTED: []}
    losses: dict[str, list[float]] = {OURS: [], PLAIN: [], HOSTED: []}

    def note(name: str, began: float, loss: float) -> float:
        now = time.perf_counter()
        seconds[name].append(now - began)
        losses[name].append(loss)
        return now

    def others_turn(loss: float) -> None:
        nonlocal began
        now = note(HOSTED, began, loss)
        now = note(OURS, now, next(own))
        began = note(PLAIN, now, plain.step(steps[len(losses[PLAIN])]))

    hosted = Hosted(bases[2].model, adapter, RATE, steps, others_turn)
    began = time.perf_counter()
    hosted.run()
    apart = max(max(row) - min(row) for row in zip(*losses.values(), strict=True))
    assert apart <= CLOSE[dtype], f"the losses are {apart} apart: {losses}"
    lengths = [[len(example.tokens) for example in step] for step in steps]
    every = [length for step in lengths for length in step]
    paces = {
        name: [sum(step) / each for step, each in zip(lengths[1:], own[1:], strict=True)]
        for name, own in seconds.items()
    }
    ratios = {
        name: statistics.median(a / b for a, b in zip(paces[OURS], paces[name], strict=True))
        for name in (PLAIN, HOSTED)
    }
    result = {
        **{f"{name} (tokens/s)": statistics.median(pace) for name, pace in paces.items()},
        **{f"loradeck / {name}": ratio for name, ratio in ratios.items()},
        "losses of a step apart, at most": apart,
        "tokens a step": statistics.mean(map(sum, lengths)),
        "of these learned": sum(example.supervised for step in steps for example in step) / sum(every),
        "PEFT's padding per token": sum(len(step) * max(step) for step in lengths) / sum(every) - 1,
    }
    return show(f"speed {dtype}", result)


def memory(dtype: str, adapter: Path, count: int, sequences: int) -> dict[str, float]:
    """Peak resident memory over that with base and adapter loaded, in MiB; each system in a process of its own."""
    peaks: dict[str, float] = {}
    for name in (OURS, PLAIN, HOSTED):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            peaks[name] = process.submit(peak, name, dtype, adapter, count, sequences).result()
    result = {
        **{f"{name} (MiB)": mebibytes for name, mebibytes in peaks.items()},
        **{f"loradeck / {name}": peaks[OURS] / peaks[name] for name in (PLAIN, HOSTED)},
    }
    return show(f"memory {dtype}", result)


def peak(name: str, dtype: str, adapter: Path, count: int, sequences: int) -> float:
    """Train and return what it took, in MiB, by the kernel's own high-water mark (Linux)."""
    base = Base.load("smollm2-135m", dtype=dtype)
    examples = docstrings(base)
    order = BatchSampler(examples, sequences, seed=0)
    steps = [order[n] for n in range(count)]
    if name == HOSTED:
        train = Hosted(base.model, adapter, RATE, steps, lambda _: None).run
    elif name == PLAIN:
        plain = Plain(base.model, adapter, RATE)

        def train() -> None:
            for step in steps:
                plain.step(step)
    else:
        own = ours(base, adapter, [examples], sequences, count)

        def train() -> None:
            for _ in own:
                pass

    with torch.no_grad():
        base.model(torch.zeros(1, 1, dtype=torch.int64))  # brings in weights that are mapped and not yet read
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark to what is held now
    before = high_water()
    train()
    return high_water() - before


def high_water() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def jobs(each: int, adapter: Path, rounds: int) -> dict[str, float]:
    """Seconds for an optimizer step of 8 jobs in one pass, and for the same sequences in one job's step.

    PEFT's eight runs, one after the other, are eight steps of one plain loop: the same work but for the loading.
    """
    bases = [Base.load("smollm2-135m", dtype="float32") for _ in range(3)]
    slices = [BatchSampler(docstrings(bases[0]), each, seed=0)[n] for n in range(JOBS)]
    together = [example for own in slices for example in own]
    one = ours(bases[0], adapter, [together], len(together), rounds + 1)
    many = ours(bases[1], adapter, slices, each, rounds + 1)
    plain = Plain(bases[2].model, adapter, RATE)
    ways = {
        "one job": lambda: next(one),
        f"{JOBS} jobs in one pass": lambda: next(many),
        f"PEFT, {JOBS} runs": lambda: [plain.step(own) for own in slices],
    }
    medians = in_turns(ways, rounds)
    single, several, peft = medians.values()
    result = {
        "tokens": sum(len(example.tokens) for example in together),
        **{f"{name} (s)": value for name, value in medians.items()},
        f"{JOBS} jobs / one job": several / single,
        f"PEFT, {JOBS} runs / {JOBS} jobs": peft / several,
    }
    return show(f"{JOBS} jobs, {each} sequences a step each", result)


def start(rounds: int) -> dict[str, float]:
    """Seconds from the start of `loradeck train` to its first optimizer step, the base in the user's cache."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder, as_file(files("loradeck.demo") / "pirate.jsonl") as data:
        for n in range(rounds):
            output = Path(folder) / str(n)
            command = ["train", "smollm2-135m", str(data), "-o", str(output), "--max-steps", "1"]
            began = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-m", "loradeck", *command], stdout=subprocess.DEVNULL)
            metrics = output / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.005)
            times.append(time.perf_counter() - began)
            assert process.wait() == 0
    return show("start", {"process to first step (s)": statistics.median(times)})


if __name__ == "__main__":
    main()
