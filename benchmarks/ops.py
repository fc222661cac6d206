"""Where `stacked` and `segmented` cross: what the constants in ops/plan.py are read from.

    python -m benchmarks.ops [--rounds 30]

Sixteen rows of several tokens over several different adapters of r=8, on layers of SmolLM2-135M's shapes. Each call
meets another layer's weights, as in a model: what a cache holds from the call before would flatter both.
"""

import argparse
from collections.abc import Callable
from itertools import cycle

import torch

from benchmarks.record import in_turns, write
from loradeck.ops import choose, plan, segmented, stacked
from loradeck.ops.forms import LinearForm
from loradeck.ops.mix import Mix
from loradeck.ops.operands import Operands
from loradeck.ops.pair import Pair

ROWS, LAYERS = 16, 16


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    figures: dict[str, object] = {}
    print(f"{'layer':>10} {'adapters':>8} {'tokens':>7} {'stacked us':>10} {'segmented us':>12} {'chosen':>10}")
    for inside, outside in ((576, 576), (576, 1536), (1536, 576)):
        for count in (2, 4, 16):
            mix = Mix(tuple(((i * count // ROWS, 1.0),) for i in range(ROWS)), (1,) * ROWS)
            layers = [
                Operands(
                    LinearForm(inside, outside),
                    tuple(Pair(torch.randn(8, inside), torch.randn(outside, 8), 2.0) for _ in range(count)),
                )
                for _ in range(LAYERS)
            ]
            for tokens in (1, 4, 16, 64):
                x, y = torch.randn(ROWS, tokens, inside), torch.randn(ROWS, tokens, outside)
                chosen = choose.stacks(x, layers[0], mix, training=False)
                plans = all_stacked(mix, layers[0], tokens)
                times = in_turns({"stacked": way(stacked.lora, x, y, layers, mix, plans),
                                  "segmented": way(segmented.lora, x, y, layers, mix)}, rounds)  # fmt: skip
                row: dict[str, object] = {name: round(seconds * 1e6, 1) for name, seconds in times.items()}
                row["chosen"] = "stacked" if chosen is not None and chosen.stripes else "segmented"
                figures[f"{inside} to {outside}, {count} adapters, {tokens} tokens a row"] = row
                print(
                    f"{inside:>5}x{outside:<5} {count:>7} {tokens:>7} {row['stacked']:>10} {row['segmented']:>12}"
                    f" {row['chosen']:>10}"
                )
    print(f"written: {write('ops', figures)}")


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


if __name__ == "__main__":
    main()
