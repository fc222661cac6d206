"""Training speed, memory, many jobs at once and time to the first step, against PEFT in the same run.

    python -m benchmarks train [--only speed memory jobs start] [--dtypes float32 bfloat16] [--rounds 3]
        [--steps 12] [--sequences 8]
    python -m benchmarks train --device cuda [--shape Llama-3.2-1B Llama-3.1-8B]

On SmolLM2-135M with adapters of r=16 on all linear layers (210 modules). Examples: docstrings of Python's library, as
answers to what a function does, 48 to 512 tokens each with the prompt, which is masked; 8 of them a step. On bases of
random weights: the speed alone, on 4 sequences of one length, so that PEFT pads nothing.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import PERCENT, Figure, Suite, Table
from benchmarks.harness import Run, alternate, in_new_process, parser
from benchmarks.memory import peak
from benchmarks.models import RandomAdapters, random_model
from benchmarks.workloads import RATE, docstring_examples, training_steps
from loradeck import Base, LoraConfig
from loradeck.base.fingerprint import fingerprint
from loradeck.base.load import SMOLLM2
from loradeck.base.weights import shared_copy
from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.train.batching import BatchSampler

PARTS = ("speed", "memory", "jobs", "start")
DTYPES = ("float32", "bfloat16")
OURS, PLAIN, TRAINER = "loradeck", "PEFT, plain loop", "PEFT, transformers' Trainer"
SYSTEMS = (OURS, PLAIN, TRAINER)
LORA = LoraConfig(r=16, lora_alpha=32)
JOBS = 8
MEMORY_STEPS = 3  # a step's peak is that of its longest examples, and the next steps reuse it
# Losses of one step, between the systems. Padded and packed rows round differently, and Adam's first steps are as long
# for a small gradient as for a large one: after one of them bf16's rounding shows.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}

SUITE = Suite(
    "train",
    "Training",
    "SmolLM2-135M, r=16, all linear layers, ragged examples with the prompt masked",
    (
        Table(
            "Speed",
            ("speed {column}", "{row}"),
            (
                Figure(
                    f"loradeck / {TRAINER}",
                    "tokens/s relative to PEFT with transformers' Trainer",
                    "×",
                    "≥ 2",
                    headline="training: tokens/s relative to PEFT with transformers' Trainer",
                ),
                Figure(f"loradeck / {PLAIN}", "tokens/s relative to PEFT in a plain loop", "×"),
                Figure("losses of a step apart, at most", "largest difference of the systems' losses of one step"),
                Figure("tokens a step", "tokens per step"),
                Figure("of these learned", "share of tokens that are trained on", PERCENT),
                Figure("PEFT's padding per token", "PEFT's padding, relative to the tokens", PERCENT),
            ),
        ),
        Table(
            "Peak memory of training",
            ("memory {column}", "{row}"),
            (
                Figure(
                    f"loradeck / {TRAINER}",
                    "relative to PEFT with transformers' Trainer",
                    "×",
                    "≤ 0.5",
                    headline="training: peak memory relative to PEFT with transformers' Trainer",
                ),
                Figure(f"loradeck / {PLAIN}", "relative to PEFT in a plain loop", "×"),
            ),
        ),
        Table(
            f"{JOBS} jobs in one pass, by sequences per job and step",
            (f"{JOBS} jobs, {{column}} sequences a step each", "{row}"),
            (
                Figure(f"{JOBS} jobs / one job", "8 jobs: time of a step relative to one job's", "×", "≤ 1.15"),
                Figure(f"PEFT, {JOBS} runs / {JOBS} jobs", "8 jobs: times faster than 8 runs of PEFT", "×"),
            ),
        ),
        Table(
            "Start",
            ("start", "{row}"),
            (Figure("process to first step (s)", "from the start of the process to the first step", target="< 5"),),
        ),
        Table(
            "Training step on random weights, 4 sequences of one length",
            ("train {column}", "{row}"),
            (Figure("PEFT / loradeck, time of a step", "times faster than PEFT in a plain loop", "×"),),
        ),
    ),
    """
- *speed*: real tokens per second, without padding. The systems alternate after each step, on the same examples from
  the same adapter, and their losses are asserted to be equal (1e-3 in float32).
- *memory*: the kernel's peak less what is held with base and adapter loaded; a process for each system.
- *8 jobs*: an optimizer step of 8 jobs in one pass, relative to one job's step on the same sequences. PEFT's 8 runs
  are 8 steps of its plain loop, one after the other.
""",
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=3, parts=PARTS, dtypes=DTYPES, shapes=True)
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--sequences", type=int, default=8, help="of a step")
    run = Run(SUITE, options, arguments)
    only, rounds, sequences = run.options.only, run.options.rounds, run.options.sequences
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for shape in run.options.shape:
            model = random_model(shape, run.device)
            adapter = RandomAdapters(model).make(0, LORA, dtype=model.dtype).save(folder / shape)
            run.add(f"train {shape}", equal_lengths(model, adapter, rounds))
            del model
            gc.collect()
        if not run.options.shape:
            model = Base.load(SMOLLM2, dtype="float32").model
            adapter = RandomAdapters(model).make(0, LORA, strength=0).save(folder / "new")
            del model
            for dtype in run.options.dtypes:
                if "speed" in only:
                    run.add(f"speed {dtype}", speed(dtype, adapter, run.options.steps, sequences))
                    gc.collect()
                if "memory" in only:
                    steps = min(MEMORY_STEPS, run.options.steps)
                    run.add(f"memory {dtype}", memory(dtype, adapter, steps, sequences))
            for each in sorted({1, max(1, sequences // 2)}) if "jobs" in only else ():
                run.add(f"{JOBS} jobs, {each} sequences a step each", jobs(each, adapter, rounds))
                gc.collect()
            if "start" in only:
                run.add("start", start(rounds))
    run.end()


def speed(dtype: str, adapter: Path, count: int, sequences: int) -> dict[str, float]:
    """Return tokens per second without padding; the systems alternate after each step, all on the same examples."""
    from benchmarks.peers.peft_training import Plain, WithTrainer

    bases = [Base.load(SMOLLM2, dtype=dtype) for _ in SYSTEMS]
    examples = docstring_examples(bases[0])
    batches = BatchSampler(examples, sequences, seed=0)
    steps = [batches[n] for n in range(count + 1)]  # the first is to warm up
    ours = training_steps(bases[0], adapter, [examples], sequences, len(steps))
    plain = Plain(bases[1].model, adapter, RATE)
    times: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    losses: dict[str, list[float]] = {name: [] for name in SYSTEMS}

    def note(name: str, begin: float, loss: float) -> float:
        now = time.perf_counter()
        times[name].append(now - begin)
        losses[name].append(loss)
        return now

    def after_step(loss: float) -> None:  # the Trainer owns its loop, so the others make their steps between its own
        nonlocal begin
        now = note(TRAINER, begin, loss)
        now = note(OURS, now, next(ours))
        begin = note(PLAIN, now, plain.step(steps[len(losses[PLAIN])]))

    trainer = WithTrainer(bases[2].model, adapter, RATE, steps, after_step)
    begin = time.perf_counter()
    trainer.run()
    difference = max(max(row) - min(row) for row in zip(*losses.values(), strict=True))
    assert difference <= TOLERANCE[dtype], f"the losses differ by {difference}: {losses}"
    lengths = [[len(example.tokens) for example in step] for step in steps]
    tokens = sum(map(sum, lengths))
    rates = {
        name: [sum(step) / seconds for step, seconds in zip(lengths[1:], each[1:], strict=True)]
        for name, each in times.items()
    }
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[OURS], rates[name], strict=True))
        for name in (PLAIN, TRAINER)
    }
    return {
        **{f"{name} (tokens/s)": statistics.median(rate) for name, rate in rates.items()},
        **{f"loradeck / {name}": ratio for name, ratio in ratios.items()},
        "losses of a step apart, at most": difference,
        "tokens a step": tokens / len(steps),
        "of these learned": sum(example.supervised for step in steps for example in step) / tokens,
        "PEFT's padding per token": sum(len(step) * max(step) for step in lengths) / tokens - 1,
    }


def memory(dtype: str, adapter: Path, count: int, sequences: int) -> dict[str, float]:
    """Return the peak resident memory in MiB over that with base and adapter loaded, each in a process of its own."""
    peaks = {name: in_new_process(peak_of, name, dtype, adapter, count, sequences) for name in SYSTEMS}
    return {
        **{f"{name} (MiB)": mebibytes for name, mebibytes in peaks.items()},
        **{f"loradeck / {name}": peaks[OURS] / peaks[name] for name in (PLAIN, TRAINER)},
    }


def peak_of(name: str, dtype: str, adapter: Path, count: int, sequences: int) -> float:
    """Return the MiB that training takes in one of the systems."""
    from benchmarks.peers.peft_training import Plain, WithTrainer

    base = Base.load(SMOLLM2, dtype=dtype)
    examples = docstring_examples(base)
    batches = BatchSampler(examples, sequences, seed=0)
    steps = [batches[n] for n in range(count)]
    run: Callable[[], object]
    if name == TRAINER:
        run = WithTrainer(base.model, adapter, RATE, steps, lambda _: None).run
    elif name == PLAIN:
        plain = Plain(base.model, adapter, RATE)
        run = lambda: [plain.step(step) for step in steps]  # noqa: E731
    else:
        ours = training_steps(base, adapter, [examples], sequences, count)
        run = lambda: [*ours]  # noqa: E731
    with torch.no_grad():
        base.model(torch.zeros(1, 1, dtype=torch.int64))  # reads weights that are mapped and not yet in memory
    return peak(run)


def jobs(each: int, adapter: Path, rounds: int) -> dict[str, float]:
    """Return the seconds of an optimizer step of 8 jobs in one pass, and of one job's step on the same sequences.

    PEFT's eight runs, one after the other, are eight steps of one plain loop: the same work without the loading.
    """
    from benchmarks.peers.peft_training import Plain

    bases = [Base.load(SMOLLM2, dtype="float32") for _ in range(3)]
    batches = BatchSampler(docstring_examples(bases[0]), each, seed=0)
    datasets = [batches[n] for n in range(JOBS)]
    together = [example for dataset in datasets for example in dataset]
    one = training_steps(bases[0], adapter, [together], len(together), rounds + 1)
    many = training_steps(bases[1], adapter, datasets, each, rounds + 1)
    plain = Plain(bases[2].model, adapter, RATE)
    runs: dict[str, Callable[[], object]] = {
        "one job": lambda: next(one),
        f"{JOBS} jobs in one pass": lambda: next(many),
        f"PEFT, {JOBS} runs": lambda: [plain.step(dataset) for dataset in datasets],
    }
    medians = alternate(runs, rounds)
    single, several, peft = medians.values()
    return {
        "tokens": sum(len(example.tokens) for example in together),
        **{f"{name} (s)": seconds for name, seconds in medians.items()},
        f"{JOBS} jobs / one job": several / single,
        f"PEFT, {JOBS} runs / {JOBS} jobs": peft / several,
    }


def start(rounds: int) -> dict[str, float]:
    """Return the seconds from the start of `loradeck train` to its first step, with the base in the user's cache."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder, as_file(files("loradeck.demo") / "pirate.jsonl") as data:
        for n in range(rounds):
            output = Path(folder) / str(n)
            command = ["train", "smollm2-135m", str(data), "-o", str(output), "--max-steps", "1"]
            begin = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-m", "loradeck", *command], stdout=subprocess.DEVNULL)
            metrics = output / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.005)
            times.append(time.perf_counter() - begin)
            assert process.wait() == 0
    return {"process to first step (s)": statistics.median(times)}


def equal_lengths(model: Any, adapter: Path, rounds: int) -> dict[str, float]:
    """Return tokens per second of optimizer steps on 4 sequences of the same length, at once as in PEFT's loop."""
    length = min(512, model.config.max_position_embeddings)
    tokens = torch.randint(2, model.config.vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    examples = [Example(row, [UNSUPERVISED, *row[1:]]) for row in tokens.tolist()]
    copy = shared_copy(model)
    # pyrefly: ignore [bad-argument-type]  (a trainer reads no text)
    base = Base(copy, None, "random", "random", fingerprint(copy))
    ours = training_steps(base, adapter, [examples], len(examples), rounds + 1, max_tokens=tokens.numel())
    losses: dict[str, list[float]] = {OURS: [], PLAIN: []}
    runs: dict[str, Callable[[], object]] = {OURS: lambda: losses[OURS].append(next(ours))}
    if find_spec("peft"):
        from benchmarks.peers.peft_training import Plain

        plain = Plain(shared_copy(model), adapter, RATE)
        runs[PLAIN] = lambda: losses[PLAIN].append(plain.step(examples))
    seconds = alternate(runs, rounds, device=model.device)
    figures = {f"{name} (tokens/s)": tokens.numel() / each for name, each in seconds.items()}
    if PLAIN in seconds:
        figures["PEFT / loradeck, time of a step"] = seconds[PLAIN] / seconds[OURS]
        differences = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
        figures["largest difference of the losses of a step"] = max(differences)
    return figures
