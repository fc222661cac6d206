"""Where `packed` and `segmented` cross: what GROUP_OVERHEAD in ops/choose.py is read from.

    python -m benchmarks.ops [--rounds 30]

Sixteen rows of several tokens over several different adapters of r=8, on layers of SmolLM2-135M's shapes.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.record import in_turns, write
from loradeck.ops import choose, packed, segmented
from loradeck.ops.forms import LinearForm
from loradeck.ops.mix import Mix
from loradeck.ops.operands import Operands, Pair

ROWS = 16


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    figures: dict[str, object] = {}
    print(f"{'layer':>10} {'adapters':>8} {'tokens':>7} {'packed us':>10} {'segmented us':>12} {'chosen':>10}")
    for inside, outside in ((576, 576), (576, 1536), (1536, 576)):
        for groups in (2, 4, 16):
            mix = Mix(tuple(((i * groups // ROWS, 1.0),) for i in range(ROWS)), (1,) * ROWS)
            pairs = tuple(Pair(torch.randn(8, inside), torch.randn(outside, 8), 2.0) for _ in range(groups))
            operands = Operands(LinearForm(inside, outside), pairs)
            for tokens in (1, 4, 16, 64):
                x, y = torch.randn(ROWS, tokens, inside), torch.randn(ROWS, tokens, outside)
                ways: dict[str, Callable[[], object]] = {
                    "packed": partial(packed.lora, x, y, operands, mix),
                    "segmented": partial(segmented.lora, x, y, operands, mix),
                }
                times = in_turns(ways, rounds)
                chosen = "packed" if choose.packs(x, y, operands, mix, training=False) else "segmented"
                row = {name: round(seconds * 1e6, 1) for name, seconds in times.items()} | {"chosen": chosen}
                figures[f"{inside} to {outside}, {groups} adapters, {tokens} tokens a row"] = row
                print(
                    f"{inside:>5}x{outside:<5} {groups:>7} {tokens:>7} {row['packed']:>10} {row['segmented']:>12}"
                    f" {chosen:>10}"
                )
    print(f"written: {write('ops', figures)}")


if __name__ == "__main__":
    main()
