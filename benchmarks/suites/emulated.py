"""What packed weights change for a base in bfloat16 where the CPU only emulates it: training, prompts, decoding.

    python -m benchmarks emulated [--rounds 5] [--sequences 2]

The base in float32 is measured beside it. The training is that of `python -m benchmarks train`, with fewer sequences
a step.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import CPU, Run, alternate, parser, seconds
from benchmarks.models import RandomAdapters
from benchmarks.workloads import PASSES, docstring_examples, forward_pass, training_steps
from loradeck import Base, LoraConfig
from loradeck.base.load import SMOLLM2
from loradeck.dtypes import computes_in

PLAIN, PACKED, FLOAT = "bfloat16, plain", "bfloat16, packed", "float32, packed"
FASTER = "packed: times faster than plain"
DIFFERENCE = "loss off float32's, at most; "

SUITE = Suite(
    "emulated",
    "Half precision where it is emulated",
    "SmolLM2-135M in bfloat16 on a CPU without arithmetic for it",
    (
        Table(
            "Training step",
            ("training", "{row}"),
            (
                Figure("plain / packed", FASTER, "×", "≥ 1.3"),
                *(
                    Figure(f"{DIFFERENCE}{name}", f"{name}: largest difference from float32's loss")
                    for name in (PLAIN, PACKED)
                ),
            ),
        ),
        Table(
            "Forward passes",
            ("forward passes", "{row}"),
            tuple(Figure(f"{name}; plain / packed", f"{name}; {FASTER}", "×") for name in PASSES),
        ),
    ),
    """
- *training step*: r=16 on all linear layers, two sequences; the steps alternate. Losses are compared with those of a
  base in float32 over the same steps.
- *forward passes*: plain transformers, no adapters. Packed weights are multiplied in float32 here.
""",
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=5)
    options.add_argument("--sequences", type=int, default=2, help="of a training step")
    run = Run(SUITE, options, arguments)
    rounds = run.options.rounds
    if computes_in(torch.bfloat16, CPU):
        print("this CPU computes in bfloat16: nothing to measure")
        return
    bases = {
        PLAIN: Base.load(SMOLLM2, dtype="bfloat16", device="cpu"),
        PACKED: Base.load(SMOLLM2, dtype="bfloat16", device="cpu", weights="packed"),
        FLOAT: Base.load(SMOLLM2, dtype="float32", device="cpu", weights="packed"),
    }
    run.add("forward passes", passes(bases, rounds))
    with tempfile.TemporaryDirectory() as folder:
        lora = LoraConfig(r=16, lora_alpha=32)
        model = Base.load(SMOLLM2, dtype="float32").model
        adapter = RandomAdapters(model).make(0, lora, strength=0).save(Path(folder) / "new")
        del model
        steps = {
            name: training_steps(base, adapter, [docstring_examples(base)], run.options.sequences, rounds + 1)
            for name, base in bases.items()
        }
        run.add("training", training(steps, rounds))
    run.end()


@torch.inference_mode()
def passes(bases: dict[str, Base], rounds: int) -> dict[str, float]:
    """Return the milliseconds of forward passes, and how many times faster packed weights are."""
    figures: dict[str, float] = {}
    for name, (rows, tokens) in PASSES.items():
        runs = {weights: forward_pass(base.model, rows, tokens) for weights, base in bases.items()}
        times = alternate(runs, rounds)
        figures |= {f"{name}; {weights} (ms)": each * 1e3 for weights, each in times.items()}
        figures[f"{name}; plain / packed"] = times[PLAIN] / times[PACKED]
    return figures


def training(steps: dict[str, Iterator[float]], rounds: int) -> dict[str, float]:
    """Return the seconds of a step, how many times faster packed weights are, and how far the losses differ."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, each in steps.items():
            times[name].append(seconds(lambda name=name, each=each: losses[name].append(next(each))))
    ratios = [plain / packed for plain, packed in zip(times[PLAIN], times[PACKED], strict=True)]
    figures = {f"{name} (s)": statistics.median(each[1:]) for name, each in times.items()}
    figures["plain / packed"] = statistics.median(ratios[1:])
    for name in (PLAIN, PACKED):
        differences = [abs(a - b) for a, b in zip(losses[name], losses[FLOAT], strict=True)]
        figures[DIFFERENCE + name] = max(differences)
    return figures
