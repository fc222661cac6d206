"""Where the ways of computing cross: what the constants in ops/plan.py and ops/meetings.py are read from.

    python -m benchmarks.suites.ops [--rounds 30]

Sixteen rows of several tokens over several different adapters of r=8, then one adapter of several ranks on long rows,
on layers of SmolLM2-135M's shapes. Each call meets another layer's weights, as in a model: what a cache holds from the
call before would flatter all.
"""

from collections.abc import Callable, Sequence
from itertools import cycle

import torch

from benchmarks.figures import Suite, Table
from benchmarks.harness import Run, alternate, parser
from loradeck.ops import cpu, plan, portable, segments, stacked
from loradeck.ops.layer_kinds import LinearForm
from loradeck.ops.mapping import Mix
from loradeck.ops.operands import Operands
from loradeck.ops.weights import Pair

ROWS, LAYERS = 16, 16


SUITE = Suite("ops", "The operation", "One layer", (Table("By implementation", ("{row}", "{column}"), unit="µs"),))


@torch.no_grad()
def main(arguments: Sequence[str]) -> None:
    run = Run(SUITE, parser(SUITE, __doc__, rounds=30), arguments)
    rounds = run.options.rounds
    for dtype in (torch.float32, torch.bfloat16):
        for inside, outside in ((576, 576), (576, 1536), (1536, 576)):
            for count in (2, 4, 16):
                for tokens in (1, 4, 16, 64):
                    name = f"{short(dtype)}, {inside} to {outside}, {count} adapters of r=8, {tokens} tokens a row"
                    run.add(name, compared(dtype, inside, outside, [8] * count, tokens, rounds))
        for r in (8, 16, 32, 64, 128):
            for tokens in (1, 4, 16, 64):
                name = f"{short(dtype)}, 576 to 1536, 1 adapter of r={r}, {tokens} tokens a row"
                run.add(name, compared(dtype, 576, 1536, [r], tokens, rounds))
    run.end()


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compared(
    dtype: torch.dtype, inside: int, outside: int, ranks: list[int], tokens: int, rounds: int
) -> dict[str, float]:
    """Microseconds of each way, sixteen rows of so many tokens evenly over adapters of these ranks."""
    mix = Mix(tuple(((i * len(ranks) // ROWS, 1.0),) for i in range(ROWS)), (1,) * ROWS)
    layers = [
        Operands(
            LinearForm(inside, outside),
            # views, as a loaded adapter has them
            tuple(Pair(torch.randn(r, inside).to(dtype)[:], torch.randn(outside, r).to(dtype)[:], 2.0) for r in ranks),
        )
        for _ in range(LAYERS)
    ]
    x, y = torch.randn(ROWS, tokens, inside).to(dtype), torch.randn(ROWS, tokens, outside).to(dtype)
    ways = {"segmented": way(portable.lora, x, y, layers, mix)}
    if len(ranks) > 1:
        ways["stacked"] = way(stacked.lora, x, y, layers, mix, all_stacked(mix, layers[0], tokens))
    if cpu.takes(x, y):
        ways["native"] = way(cpu.lora, x, y, layers, mix, all_native(mix, layers[0], tokens))
    return {name: round(seconds * 1e6, 1) for name, seconds in alternate(ways, rounds).items()}


def way(
    lora: Callable[..., object], x: torch.Tensor, y: torch.Tensor, layers: list[Operands], *rest: object
) -> Callable[[], object]:
    """One call, on the next layer each time; all have been met once."""
    for own in layers:
        lora(x, y, own, *rest)
    turns = cycle(layers)
    return lambda: lora(x, y, next(turns), *rest)


def all_stacked(mix: Mix, operands: Operands, unit: int, device: str = "cpu") -> plan.Plan:
    """The plan that has every group in stacks, whatever it costs."""
    kept, plan.SEGMENT = plan.SEGMENT, 1e9
    try:
        return plan.plan_of(Mix(mix.entries, mix.lengths), operands.slots, unit, torch.device(device))
    finally:
        plan.SEGMENT = kept


def all_native(mix: Mix, operands: Operands, unit: int) -> segments.Meetings:
    """The plan that leaves no group to others."""
    kept, segments.MEETING = segments.MEETING, 0.0
    try:
        return cpu.plan(Mix(mix.entries, mix.lengths), operands.slots, unit)
    finally:
        segments.MEETING = kept
