"""What is left of a rate beside another busy process, with and without sharing the cores.

    python -m benchmarks busy [--rounds 7] [--only training generation serving]

training    steps of 4 short examples, through one adapter
generation  one prompt through one adapter, by `generate`
serving     16 requests through 4 adapters in one batch, by the engine

The other process is one endless loop. Each setting is a process of its own; they take turns, alone and then beside the
loop, which is stopped in between. After each change nothing is measured for two seconds.
"""

import operator
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import Run, parser, seconds
from benchmarks.models import RandomAdapters, random_store
from benchmarks.processes import take_turns_beside_a_loop, worker
from benchmarks.workloads import docstring_examples, training_steps
from loradeck import Bank, Base, LoraConfig, generate
from loradeck.base import SMOLLM2
from loradeck.base.openmp import VARIABLES, share_cores
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

PARTS = ("training", "generation", "serving")
DEFAULT = "torch's default"
KEPT = "kept beside a busy process"
ALONE = "alone, relative to torch's default"
KEPT_BY_DEFAULT = "kept by torch's default"
OURS = "loradeck"
TOKENS = 8
ROWS, ADAPTERS = 16, 4
BATCH = 4  # examples
LONGEST = 96  # tokens of an example
PROMPT = "Tell a story about a ship and its crew."

SUITE = Suite(
    "busy",
    "A busy machine",
    "SmolLM2-135M, r=8, all linear layers, beside one endless loop",
    tuple(
        Table(
            f"{part.capitalize()}",
            (part, "{column}", "{row}"),
            (
                Figure("alone (tokens/s)"),
                Figure("beside a busy process (tokens/s)"),
                Figure(KEPT, unit="×", target="≥ 0.45"),
                Figure(ALONE, unit="×", target="≥ 0.97"),
                Figure(KEPT_BY_DEFAULT, unit="×"),
            ),
        )
        for part in PARTS
    ),
    """
- *torch's default* leaves OpenMP's threads as they are, *loradeck* shares the cores as the command does
  ([threads.md](threads.md)). That is for training: generation and serving go through the compiled step, which has
  threads of its own.
- *kept*: the rate beside the loop over the same setting's rate alone, as medians. On two cores a third process leaves
  two thirds of the machine at best, and half to a team of two threads that share a core with it.
""",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=7, parts=PARTS)
    run = Run(SUITE, options, arguments)
    for name in VARIABLES:
        os.environ.pop(name, None)
    for part in run.options.only:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
            workers = {
                name: running.enter_context(worker(prepare, part, name, Path(folder, name))) for name in (DEFAULT, OURS)
            }
            for turn in workers.values():
                turn()  # packs and compiles
            run.add(part, rates(*take_turns_beside_a_loop(workers, run.options.rounds)))
    run.end()


def rates(alone: Mapping[str, list[float]], beside: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return each setting's figures, from its tokens per second."""
    figures: dict[str, dict[str, float]] = {}
    for name in alone:
        rate, rate_beside = statistics.median(alone[name]), statistics.median(beside[name])
        figures[name] = {"alone (tokens/s)": rate, "beside a busy process (tokens/s)": rate_beside}
        if name == DEFAULT:
            figures[name][KEPT_BY_DEFAULT] = rate_beside / rate
        else:
            ratios = map(operator.truediv, alone[name], alone[DEFAULT])
            figures[name][KEPT] = rate_beside / rate
            figures[name][ALONE] = statistics.median(ratios)
    return figures


def prepare(part: str, setting: str, folder: Path) -> Callable[[], float]:
    """Return a turn of work, which returns its tokens per second."""
    if setting == OURS:
        assert share_cores()
    tokens, work = WORK[part](folder)
    return lambda: tokens / seconds(work)


def training(folder: Path) -> tuple[int, Callable[[], object]]:
    base = Base.load(SMOLLM2, weights="packed")
    RandomAdapters(base.model).make(0, LoraConfig(r=8)).save(folder / "a")
    examples = [each for each in docstring_examples(base) if len(each.tokens) <= LONGEST][:BATCH]
    steps = training_steps(base, folder / "a", [examples], BATCH, 1_000_000)
    return sum(len(each.tokens) for each in examples), partial(next, steps)


def generation(_: Path) -> tuple[int, Callable[[], object]]:
    base = Base.load(SMOLLM2, weights="blocks")
    bank = Bank(base.model)
    bank.add("a", RandomAdapters(base.model).make(0, LoraConfig(r=8)))
    return TOKENS, partial(generate, base, bank, [PROMPT], "a", max_new_tokens=TOKENS)


def serving(folder: Path) -> tuple[int, Callable[[], object]]:
    base = Base.load(SMOLLM2, weights="blocks")
    engine = Engine(base, random_store(base.model, folder, count=ADAPTERS, r=8), EngineConfig(max_rows=ROWS))
    prompts = [base.tokenizer(PROMPT)["input_ids"]] * ROWS
    names = [f"a{row % ADAPTERS}" for row in range(ROWS)]
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    return ROWS * TOKENS, partial(engine.generate, prompts, names, params)


WORK: Mapping[str, Callable[[Path], tuple[int, Callable[[], object]]]] = {
    "training": training,
    "generation": generation,
    "serving": serving,
}
