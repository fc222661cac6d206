"""What a frozen linear layer costs in each weight format; base/prepacked.py and quantised.py quote it.

    python -m benchmarks.kernels [--rounds 9] [--dtype bfloat16]

Layers of SmolLM2-135M's shapes. Each way goes through enough different weights that none is in the cache when its turn
comes again, as in a model; the ways take turns, and figures are medians. `plain`, `packed`, `int8 product` and `int8
made plain` are the library's own; the others were tried, and are not:

    int8 x int8   the inputs quantised too, row by row and at each call, for oneDNN's product of bytes
    int4          groups of 32 weights, each with a scale and a zero point; the op takes bfloat16 only
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import in_quiet_turns, write
from loradeck.base.load import DTYPES
from loradeck.base.prepacked import _pack_weight
from loradeck.base.quantised import _few, _many, quantise

Product: TypeAlias = Callable[[Tensor], Tensor]
HEAD = (49152, 576)
APART = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]  # q k v o gate up down
TOGETHER = [(960, 576), (576, 576), (3072, 576), (576, 1536)]  # qkv o gate-up down
SHAPES = [*dict.fromkeys(APART), HEAD]
ROWS, FEW, GROUP = (1, 4, 16, 64, 256), 16, 32
MEMORY = 40_000_000  # weights that one way goes through: more than any cache here holds


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), action="append")
    arguments = parser.parse_args()
    figures: dict[str, object] = {}
    for name in arguments.dtype or ("bfloat16", "float32"):
        dtype = DTYPES[name]
        for at, shapes in (("each layer apart", APART), ("q, k, v and gate, up as one", TOGETHER)):
            figures[f"{name}, all layers, {at}, ms"] = _steps(shapes, dtype, arguments.rounds)
        figures[f"{name}, one layer, µs"] = _layers(dtype, arguments.rounds)
    print(f"written: {write('kernels', figures)}")


def _steps(shapes: list[tuple[int, int]], dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """All products of one forward pass of SmolLM2-135M, thirty layers and the head, by rows."""
    weights = [torch.randn(shape).mul_(0.02).to(dtype) for _ in range(30) for shape in shapes]
    weights.append(torch.randn(HEAD).mul_(0.02).to(dtype))
    ways = {name: [make(weight) for weight in weights] for name, make in _makers(dtype).items()}
    found: dict[str, dict[str, float]] = {}
    for rows in ROWS:
        inputs = {inside: torch.randn(rows, inside).to(dtype) for inside in (576, 1536)}
        xs = [inputs[weight.shape[1]] for weight in weights]
        own = {name: partial(_run, products, xs) for name, products in ways.items() if _is_tried(name, rows)}
        found[f"{rows} rows"] = {name: round(each * 1e3, 2) for name, each in in_quiet_turns(own, rounds).items()}
        print(dtype, len(shapes), "layers", rows, found[f"{rows} rows"], flush=True)
    return found


def _layers(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """One product, by the layer's shape and rows."""
    found: dict[str, dict[str, float]] = {}
    for outside, inside in SHAPES:
        count = max(1, MEMORY // (outside * inside * dtype.itemsize))
        weights = [torch.randn(outside, inside).to(dtype) for _ in range(count)]
        ways = {name: [make(weight) for weight in weights] for name, make in _makers(dtype).items()}
        for rows in ROWS:
            xs = [torch.randn(rows, inside).to(dtype)] * count
            own = {name: partial(_run, products, xs) for name, products in ways.items() if _is_tried(name, rows)}
            times = in_quiet_turns(own, rounds)
            found[f"{inside} to {outside}, {rows} rows"] = {
                name: round(each / count * 1e6, 1) for name, each in times.items()
            }
            print(dtype, outside, inside, rows, found[f"{inside} to {outside}, {rows} rows"], flush=True)
    return found


def _run(products: list[Product], xs: list[Tensor]) -> None:
    for product, x in zip(products, xs, strict=True):
        product(x)


def _is_tried(name: str, rows: int) -> bool:
    """Leave out what takes many times the plain way, and would take most of the run."""
    return rows <= FEW or name not in ("int8 product", "int4")


def _makers(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Product]]:
    makers: dict[str, Callable[[Tensor], Product]] = {
        "plain": _plain_product,
        "packed": _packed_product,
        "int8 product": partial(_quantised_product, way=_few),
        "int8 made plain": partial(_quantised_product, way=_many),
        "int8 x int8": _bytes_product,
    }
    return makers | ({"int4": _int4_product} if dtype == torch.bfloat16 else {})


def _plain_product(weight: Tensor) -> Product:
    return partial(F.linear, weight=weight)


def _packed_product(weight: Tensor) -> Product:
    own = _pack_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise.default(x, own, None, "none", [], "")


def _quantised_product(weight: Tensor, way: Callable[..., Tensor]) -> Product:
    q, scales = quantise(weight)
    return partial(way, q=q, scales=scales)


def _bytes_product(weight: Tensor) -> Product:
    q, scales = quantise(weight)
    own = torch.ops.onednn.qlinear_prepack.default(q.detach(), None)
    scales, zeros = scales.detach().float(), torch.zeros(len(scales), dtype=torch.int64)
    middle, dtype = torch.tensor(128.5), weight.dtype  # bytes without a sign: with one, the op takes a slow reference

    def product(x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True)
        bytes_ = torch.addcmul(middle, x, 127 / largest).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise.default(
            bytes_, 1.0, 128, own, scales, zeros, None, 1.0, 0, dtype, "none", [], ""
        )
        return y.mul_(largest / 127)

    return product


def _int4_product(weight: Tensor) -> Product:
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / 15
    q = ((groups - low[..., None]) / scales[..., None]).round_().to(torch.int32).flatten(1)
    own = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default(q, 2)
    levels = torch.stack([scales, low + 8 * scales], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu.default(x, own, GROUP, levels)


if __name__ == "__main__":
    main()
