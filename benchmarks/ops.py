"""Where the implementations of the update cross: the source of the constants in ops/cpu.py.

    python -m benchmarks.ops [--rounds 30]

Sixteen rows of several tokens over several different adapters of r=8, then one adapter of several ranks on long rows,
on layers of SmolLM2-135M's shapes. Each call uses another layer's weights, as in a model: what the cache holds from
the call before would flatter all.
"""

import argparse
from collections.abc import Callable
from itertools import cycle

import torch

from benchmarks.record import in_turns, write
from loradeck.ops import cpu, portable
from loradeck.ops.layer_kinds import LinearKind
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.segments import Segments
from loradeck.ops.weights import LayerAdapters, LoraWeights

ROWS, LAYERS = 16, 16


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    figures: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for inside, outside in ((576, 576), (576, 1536), (1536, 576)):
            for count in (2, 4, 16):
                for tokens in (1, 4, 16, 64):
                    name = f"{short(dtype)}, {inside} to {outside}, {count} adapters of r=8, {tokens} tokens a row"
                    figures[name] = shown(name, compared(dtype, inside, outside, [8] * count, tokens, rounds))
        for r in (8, 16, 32, 64, 128):
            for tokens in (1, 4, 16, 64):
                name = f"{short(dtype)}, 576 to 1536, 1 adapter of r={r}, {tokens} tokens a row"
                figures[name] = shown(name, compared(dtype, 576, 1536, [r], tokens, rounds))
    print(f"written: {write('ops', figures)}")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shown(title: str, times: dict[str, float]) -> dict[str, float]:
    print(title, *(f"{name} {time}" for name, time in times.items()), sep="  ", flush=True)
    return times


def compared(
    dtype: torch.dtype, inside: int, outside: int, ranks: list[int], tokens: int, rounds: int
) -> dict[str, float]:
    """Microseconds of each implementation: sixteen rows of this many tokens, evenly over adapters of these ranks."""
    mapping = LoraMapping(tuple(((i * len(ranks) // ROWS, 1.0),) for i in range(ROWS)), (1,) * ROWS)
    layers = [
        LayerAdapters(
            LinearKind(inside, outside),
            # views, as a loaded adapter has them
            tuple(
                LoraWeights(torch.randn(r, inside).to(dtype)[:], torch.randn(outside, r).to(dtype)[:], 2.0)
                for r in ranks
            ),
        )
        for _ in range(LAYERS)
    ]
    x, y = torch.randn(ROWS, tokens, inside).to(dtype), torch.randn(ROWS, tokens, outside).to(dtype)
    segments = mapping.segments(tokens, x.device)
    calls = {"portable": call(portable.lora, x, y, layers, segments)}
    if cpu.takes(x, y):
        calls["cpu"] = call(cpu.lora, x, y, layers, segments)
    return {name: round(seconds * 1e6, 1) for name, seconds in in_turns(calls, rounds).items()}


def call(
    lora: Callable[..., object], x: torch.Tensor, y: torch.Tensor, layers: list[LayerAdapters], segments: Segments
) -> Callable[[], object]:
    """One call, on the next layer each time; all have been called once."""
    for layer in layers:
        lora(x, y, layer, segments)
    layers_in_turn = cycle(layers)
    return lambda: lora(x, y, next(layers_in_turn), segments)


if __name__ == "__main__":
    main()
