"""What a base's packed and int8 weights change: forward passes, memory, perplexity, and the products one by one.

    python -m benchmarks base [--rounds 15] [--only passes products] [--dtypes bfloat16 float32] [--tokens 8192]

passes    plain transformers' forward passes, without adapters; the perplexity is that of docstrings of Python's
          standard library, in windows of 512 tokens
products  one frozen layer at a time, by rows. Each run goes through enough different weights that no cache holds one
          when it comes again, as in a model
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import Run, alternate, parser
from benchmarks.workloads import PASSES, forward_pass
from loradeck.base.load import SMOLLM2, Base
from loradeck.base.prepacked import _pack_weight
from loradeck.base.quantised import QuantisedWeight, set_weight
from loradeck.base.quantiser import quantise
from loradeck.base.weights import CHOICES
from loradeck.native.library import multiplies_halves
from loradeck.native.product import product
from loradeck.native.quantised import KINDS, Quantised, pack

DTYPES = ("bfloat16", "float32")
PARTS = ("passes", "products")
PATIENCE = 15.0  # seconds to wait for quiet rounds
WINDOW = 512
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576))  # (out, in): q o, k v, gate up, down, head
ROWS = (1, 4, 8, 16, 64, 256)
MEMORY = 40_000_000  # bytes of weights that a run goes through: more than a cache holds
MODULES = (
    "argparse asyncio collections contextlib csv decimal difflib fractions functools heapq inspect json logging "
    "pathlib pickle random re shelve socket statistics string subprocess tarfile tempfile textwrap threading unittest "
    "uuid zipfile"
)

SUITE = Suite(
    "base",
    "A base's weights",
    "SmolLM2-135M without adapters, by `weights=`",
    (
        *(
            Table(
                f"Products of one layer, {dtype}",
                (f"products {dtype}", "{row}", "{column}"),
                unit="µs",
            )
            for dtype in DTYPES
        ),
        *(
            Table(
                f"Forward passes, {dtype}",
                (dtype, "{row}", "{column}"),
                (
                    Figure("MB", "memory of the weights", "MB"),
                    *(Figure(f"{name}, ms", name, "ms") for name in PASSES),
                ),
            )
            for dtype in DTYPES
        ),
    ),
    """
- *forward passes*: transformers' own. `plain` is transformers as it is.
- *perplexity*: of docstrings of Python's standard library.
- *products*: `packed` in oneDNN's layout; `int8 product` is the compiled step's, `int8 made plain` the product with
  weights made plain a block at a time.
""",
)


@torch.inference_mode()
def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=15, parts=PARTS, dtypes=DTYPES)
    options.add_argument("--tokens", type=int, default=8192)
    run = Run(SUITE, options, arguments)
    for dtype in run.options.dtypes:
        if "passes" in run.options.only:
            run.add(dtype, passes(dtype, run.options.rounds, run.options.tokens))
        if "products" in run.options.only:
            run.add(f"products {dtype}", products(getattr(torch, dtype), run.options.rounds))
    run.end()


def passes(dtype: str, rounds: int, tokens: int) -> dict[str, dict[str, float]]:
    """Return the megabytes, the milliseconds of forward passes and the perplexity of each way to keep the weights."""
    bases = {weights: Base.load(SMOLLM2, dtype=dtype, device="cpu", weights=weights) for weights in CHOICES}
    models: dict[str, PreTrainedModel] = {weights: base.model for weights, base in bases.items()}
    sizes = {weights: sum(each.nbytes for each in model.parameters()) for weights, model in models.items()}
    figures = {"MB": {weights: nbytes / 1e6 for weights, nbytes in sizes.items()}}
    for name, (rows, length) in PASSES.items():
        runs = {weights: forward_pass(model, rows, length) for weights, model in models.items()}
        seconds = alternate(runs, rounds, patience=PATIENCE)
        figures[f"{name}, ms"] = {weights: each * 1e3 for weights, each in seconds.items()}
    ids = bases["plain"].tokenizer(docstrings())["input_ids"][:tokens]
    figures["perplexity"] = {weights: perplexity(model, ids) for weights, model in models.items()}
    return figures


def perplexity(model: PreTrainedModel, ids: list[int]) -> float:
    losses: list[Tensor] = []
    for window in torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW):
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, window[1:], reduction="none"))
    return math.exp(float(torch.cat(losses).double().mean()))


def docstrings() -> str:
    modules: Mapping[str, object] = {name: importlib.import_module(name) for name in MODULES.split()}
    return "\n\n".join(
        inspect.cleandoc(each.__doc__)
        for name, module in modules.items()
        for each in (module, *(vars(module)[key] for key in sorted(vars(module))))
        if isinstance(each.__doc__, str) and (each is module or getattr(each, "__module__", None) == name)
    )


def products(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Return the microseconds of one product, by the layer's shape and rows."""
    figures: dict[str, dict[str, float]] = {}
    for out_features, in_features in SHAPES:
        count = max(1, MEMORY // (out_features * in_features * dtype.itemsize))
        weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(count)]
        layers = {name: [make(weight) for weight in weights] for name, make in LAYERS.items()}
        for rows in ROWS:
            x = torch.randn(rows, in_features).to(dtype)
            runs = {name: partial(call_each, calls, x) for name, calls in layers.items()}
            seconds = alternate(runs, rounds, patience=PATIENCE)
            figures[f"{in_features} to {out_features}, {rows} rows"] = {
                name: each / count * 1e6 for name, each in seconds.items()
            }
    return figures


def call_each(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> None:
    for call in calls:
        call(x)


def packed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    layout = _pack_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise.default(x, layout, None, "none", [], "")


def int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    outputs, halves = len(weight), multiplies_halves(weight.dtype)
    return partial(product, weight=quantised(weight), outputs=outputs, bias=None, halves=halves)


def int8_made_plain(weight: Tensor) -> Callable[[Tensor], Tensor]:
    layer: Any = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta").requires_grad_(False)
    set_weight(layer, QuantisedWeight(quantised(weight)), weight.dtype)
    matrix, parts = layer.weight.quantised, [*layer._parts()]
    return lambda x: torch.cat([F.linear(x, matrix.dense(rows, x.dtype)) for rows in parts], 1)


def quantised(weight: Tensor) -> Quantised:
    return pack(quantise(weight, "Q8_0", "the weight"), KINDS["Q8_0"], weight.shape[1])


LAYERS: Mapping[str, Callable[[Tensor], Any]] = {
    "plain": lambda weight: partial(F.linear, weight=weight),
    "packed": packed,
    "int8 product": int8,
    "int8 made plain": int8_made_plain,
}
