"""What packed weights change for a base in bfloat16 where the CPU only emulates it: training, prompts, decoding.

    python -m benchmarks.suites.emulated [--rounds 5] [--sequences 2]

The base in float32 stands beside it. Training is that of `benchmarks.suites.train`, with so many sequences a step.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.harness import in_turns, write
from benchmarks.suites.adapters import show
from benchmarks.suites.base import PASSES, forward_pass
from benchmarks.suites.train import docstrings, make_adapter, ours
from loradeck.base.load import SMOLLM2, Base
from loradeck.dtypes import computes_in

PLAIN, PACKED, FLOAT = "bfloat16, plain", "bfloat16, packed", "float32, packed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=2, help="of a training step")
    arguments = parser.parse_args()
    if computes_in(torch.bfloat16, torch.device("cpu")):
        print("this CPU computes in bfloat16: there is nothing to measure")
        return
    bases = {
        PLAIN: Base.load(SMOLLM2, dtype="bfloat16", device="cpu"),
        PACKED: Base.load(SMOLLM2, dtype="bfloat16", device="cpu", weights="packed"),
        FLOAT: Base.load(SMOLLM2, dtype="float32", device="cpu", weights="packed"),
    }
    figures = {"forward passes": passes(bases, arguments.rounds)}
    with tempfile.TemporaryDirectory() as folder:
        adapter = make_adapter(Path(folder) / "start")
        steps = {
            name: ours(base, adapter, [docstrings(base)], arguments.sequences, arguments.rounds + 1)
            for name, base in bases.items()
        }
        figures["training"] = training(steps, arguments.rounds)
    print(f"written: {write('emulated', figures)}")


@torch.inference_mode()
def passes(bases: dict[str, Base], rounds: int) -> dict[str, float]:
    """Milliseconds of forward passes, and how many times faster packed weights are."""
    result: dict[str, float] = {}
    for name, (rows, tokens) in PASSES.items():
        ways: dict[str, Callable[[], object]] = {
            own: forward_pass(base.model, rows, tokens) for own, base in bases.items()
        }
        times = in_turns(ways, rounds)
        result |= {f"{name}; {own} (ms)": seconds * 1e3 for own, seconds in times.items()}
        result[f"{name}; plain / packed"] = times[PLAIN] / times[PACKED]
    return show("forward passes", result)


def training(steps: dict[str, Iterator[float]], rounds: int) -> dict[str, float]:
    """Seconds of a step, how many times faster packed weights are step by step, and how far losses are apart."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, own in steps.items():
            begun = time.perf_counter()
            losses[name].append(next(own))
            seconds[name].append(time.perf_counter() - begun)
    ratios = [one / other for one, other in zip(seconds[PLAIN], seconds[PACKED], strict=True)]
    return show(
        "training",
        {
            **{f"{name} (s)": statistics.median(own[1:]) for name, own in seconds.items()},
            "plain / packed": statistics.median(ratios[1:]),
            **{
                f"loss off float32's, at most; {name}": max(
                    abs(one - other) for one, other in zip(losses[name], losses[FLOAT], strict=True)
                )
                for name in (PLAIN, PACKED)
            },
        },
    )


if __name__ == "__main__":
    main()
