"""The update of one layer, by each implementation: its error against float64, and its time. Constants in ops/cpu.py and
ops/gpu.py are read from these times. And the choice of tokens, in C and in torch.

    python -m benchmarks ops [--rounds 30] [--only decode training sampling]
    python -m benchmarks ops --device cuda [--shape Llama-3.2-1B Llama-3.1-8B]

decode     16 rows of several tokens through several adapters of r=8, then long rows through one adapter of several
           ranks, on a layer of SmolLM2-135M's shape, without autograd
training   forward and backward of 8 rows of 64 tokens, through one adapter and through 8
sampling   16 rows of random logits to tokens: the likeliest, and drawn ones

On the layers of a base's shape: all implementations are checked against float64, forward and backward, and timed on 32
rows of 32 adapters of r=16. Each call meets another layer's weights, as in a model: what a cache holds from the call
before would flatter all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.figures import Suite, Table
from benchmarks.harness import CPU, Run, alternate, parser
from benchmarks.models import linear_layers, random_model
from loradeck.native.library import library
from loradeck.native.sampling import Row, choose_in_c, choose_in_torch
from loradeck.ops import autograd, cpu, dispatch, portable, reference
from loradeck.ops.layer_kinds import LayerKind, LinearKind, kind_of
from loradeck.ops.mapping import AdapterWeights, LoraMapping
from loradeck.ops.weights import LayerAdapters, LoraWeights

Lora = Callable[[Tensor, Tensor, LayerAdapters, LoraMapping], Tensor]
PARTS = ("decode", "training", "sampling")
DTYPES = (torch.float32, torch.bfloat16)
ROWS, LAYERS = 16, 16
IN, OUT = 576, 1536
TRAINING_ROWS, TRAINING_TOKENS = 8, 64
VOCABULARY, SPREAD = 49152, 4.0  # with this standard deviation, top_p=0.95 keeps some hundred tokens
# On a base's layers.
ROWS_OF_BASE = 32
RANKS = (1, 4, 8, 16, 16, 64)
BATCHES: Mapping[str, tuple[AdapterWeights, ...]] = {
    "distinct": tuple(((i, 1.0),) for i in range(ROWS_OF_BASE)),
    "identical": (((3, 1.0),),) * ROWS_OF_BASE,
    "alternating": tuple(((i % 3, 1.0),) if i % 4 else () for i in range(ROWS_OF_BASE)),
    "blended": tuple(((i, 0.7), ((i + 5) % ROWS_OF_BASE, -0.3)) if i % 5 else () for i in range(ROWS_OF_BASE)),
}
# Of the output's largest value. A number of bfloat16 has three digits, and is rounded between the two products.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

SUITE = Suite(
    "ops",
    "The operation",
    f"The update of one layer from {IN} to {OUT} features",
    (
        Table(f"{ROWS} rows, without autograd", ("decode", "{row}", "{column}"), unit="µs"),
        Table(
            f"Forward and backward, {TRAINING_ROWS} rows of {TRAINING_TOKENS} tokens",
            ("training", "{row}", "{column}"),
            unit="µs",
        ),
        Table(f"{ROWS} rows of {VOCABULARY} logits to tokens", ("sampling", "{row}", "{column}"), unit="µs"),
        Table("Error, relative to the largest output", ("errors {column}", "{row}")),
        Table(f"{ROWS_OF_BASE} rows of {ROWS_OF_BASE} adapters, r=16", ("times {column}", "{row}")),
        Table("By the implementations of that commit", ("{row}", "{column}"), unit="µs"),
    ),
    """
- *reference* is the definition, *portable* torch's own products, *cpu* the C code, *gpu* the Triton kernels, *autograd*
  the implementation of training.
""",
)


def main(arguments: Sequence[str]) -> None:
    run = Run(SUITE, parser(SUITE, __doc__, rounds=30, parts=PARTS, shapes=True), arguments)
    rounds, device = run.options.rounds, run.device
    for shape in run.options.shape:
        model = random_model(shape, device)
        dtype = model.dtype
        sizes = sorted({(layer.in_features, layer.out_features) for layer in linear_layers(model).values()})
        del model
        run.add(f"errors {shape}", errors(sizes, dtype, device) | errors_of_other_kinds(device))
        run.add(f"times {shape}", times(sizes, dtype, device, rounds))
    if not run.options.shape:
        if "decode" in run.options.only:
            run.add("decode", decode(rounds))
        if "training" in run.options.only:
            run.add("training", training(rounds))
        if "sampling" in run.options.only:
            run.add("sampling", sampling(rounds))
    run.end()


def implementations(device: torch.device) -> dict[str, Lora]:
    """Return all implementations for linear layers outside autograd that work on a device."""
    loras = {"reference": reference.lora, "portable": of_mapping(portable.lora)}
    if device.type == "cpu" and cpu.why_not_available() is None:
        loras["cpu"] = of_mapping(cpu.lora)
    if dispatch.why_not_triton(device) is None:
        from loradeck.ops import gpu

        loras["gpu"] = of_mapping(gpu.lora)
    return loras


def of_mapping(kernel: Callable[..., Tensor]) -> Lora:
    """Return a kernel that takes a mapping in place of its segments, as the reference does."""

    def lora(x: Tensor, y: Tensor, adapters: LayerAdapters, mapping: LoraMapping) -> Tensor:
        return kernel(x, y, adapters, mapping.segments(adapters.kind.count(x) // mapping.total, x.device))

    return lora


def dispatched(x: Tensor, y: Tensor, adapters: LayerAdapters, mapping: LoraMapping) -> Tensor:
    return dispatch.lora(x, y, adapters, mapping, training=False)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- times


def decode(rounds: int) -> dict[str, dict[str, float]]:
    """Return the microseconds of each implementation, by dtype, adapters and tokens."""
    cases = [([8] * count, tokens) for count in (2, 4, 16) for tokens in (1, 4, 16, 64)]
    cases += [([r], tokens) for r in (8, 16, 32, 64, 128) for tokens in (1, 4, 16, 64)]
    figures: dict[str, dict[str, float]] = {}
    for dtype in DTYPES:
        for ranks, tokens in cases:
            mapping = LoraMapping([((i * len(ranks) // ROWS, 1.0),) for i in range(ROWS)], [1] * ROWS)
            layers = [random_adapters(LinearKind(IN, OUT), dtype, ranks) for _ in range(LAYERS)]
            x, y = (torch.randn(ROWS, tokens, size).to(dtype) for size in (IN, OUT))
            loras = implementations(CPU) | {"dispatch": dispatched}
            if tokens > 1:
                del loras["reference"]  # it is no contender, and slow
            with torch.no_grad():
                runs = {name: one_layer(lora, x, y, layers, mapping) for name, lora in loras.items()}
                seconds = alternate(runs, rounds)
            adapters = f"{len(ranks)} adapter{'s' * (len(ranks) > 1)} of r={ranks[0]}"
            figures[f"{short(dtype)}, {adapters}, {tokens} tokens a row"] = microseconds(seconds)
    return figures


def one_layer(
    lora: Lora, x: Tensor, y: Tensor, layers: Sequence[LayerAdapters], mapping: LoraMapping
) -> Callable[[], object]:
    """Return a call on the next layer each time; all layers have been called once."""
    for layer in layers:
        lora(x, y, layer, mapping)
    following = cycle(layers)
    return lambda: lora(x, y, next(following), mapping)


def training(rounds: int) -> dict[str, dict[str, float]]:
    """Return the microseconds of forward and backward: ops/autograd.py, and torch's autograd of the portable one."""
    figures: dict[str, dict[str, float]] = {}
    loras = {"autograd": of_mapping(autograd.lora), "portable": of_mapping(portable.lora)}
    for dtype in DTYPES:
        for r in (8, 16, 64):
            for count in (1, TRAINING_ROWS):
                rows = range(TRAINING_ROWS)
                mapping = LoraMapping([((i * count // TRAINING_ROWS, 1.0),) for i in rows], [1] * TRAINING_ROWS)
                # Master weights are float32, as in training.
                layers = [random_adapters(LinearKind(IN, OUT), torch.float32, [r] * count) for _ in range(LAYERS)]
                layers = [trainable(layer) for layer in layers]
                x, y = (torch.randn(TRAINING_ROWS, TRAINING_TOKENS, size).to(dtype) for size in (IN, OUT))
                x.requires_grad_()
                steps = {name: forward_and_backward(lora, y) for name, lora in loras.items()}
                runs = {name: one_layer(step, x, y, layers, mapping) for name, step in steps.items()}
                adapters = f"{count} adapter{'s' * (count > 1)} of r={r}"
                figures[f"{short(dtype)}, {adapters}"] = microseconds(alternate(runs, rounds))
    return figures


def forward_and_backward(lora: Lora, gradient: Tensor) -> Lora:
    def step(x: Tensor, y: Tensor, adapters: LayerAdapters, mapping: LoraMapping) -> Tensor:
        z = lora(x, y, adapters, mapping)
        torch.autograd.grad(z, [x, *leaves(adapters)], gradient)
        return z

    return step


def sampling(rounds: int) -> dict[str, dict[str, float]]:
    """Return the microseconds of C and of torch, by how tokens are chosen."""
    figures: dict[str, dict[str, float]] = {}
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, VOCABULARY, generator=rng) * SPREAD
    numbers = torch.rand(ROWS, generator=rng).tolist()
    c = library()
    drawn = [Row(row, None, 0.8, 0, 0.95, u=u) for row, u in zip(logits, numbers, strict=True)]
    kinds = {
        "the likeliest": [Row(row) for row in logits],
        "temperature 0.8, top_p 0.95": drawn,
        "temperature 0.8, top_p 0.95, 5 logprobs": [replace(row, logprobs=5) for row in drawn],
    }
    for name, rows in kinds.items():
        runs = {"C": partial(choose_in_c, c, rows), "torch": partial(choose_in_torch, rows)}
        figures[name] = microseconds(alternate(runs, rounds))
    return figures


@torch.no_grad()
def times(sizes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    """Return the microseconds of each implementation on 32 rows of as many adapters of r=16, by the layer's size."""
    figures: dict[str, float] = {}
    mapping = LoraMapping(BATCHES["distinct"], [1] * ROWS_OF_BASE)
    loras = implementations(device) | {"dispatch": dispatched}
    del loras["reference"]
    for in_features, out_features in sizes:
        kind = LinearKind(in_features, out_features)
        layers = [random_adapters(kind, dtype, [16] * ROWS_OF_BASE, device) for _ in range(LAYERS)]
        x, y = (torch.randn(ROWS_OF_BASE, size).to(device, dtype) for size in (in_features, out_features))

        def all_layers(
            lora: Lora, x: Tensor = x, y: Tensor = y, layers: Sequence[LayerAdapters] = layers
        ) -> Callable[[], object]:
            return lambda: [lora(x, y, layer, mapping) for layer in layers]

        seconds = alternate({name: all_layers(lora) for name, lora in loras.items()}, rounds, device=device)
        figures |= {
            f"{in_features} to {out_features}, {name} (us)": 1e6 * each / LAYERS for name, each in seconds.items()
        }
    return figures


def microseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: 1e6 * each for name, each in seconds.items()}


# ---- errors


def errors(sizes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return each implementation's largest error on linear layers, forward and backward.

    Raises:
        AssertionError: one is beyond its tolerance.
    """
    figures: dict[str, float] = {}
    for each in dict.fromkeys((torch.float32, dtype)):
        for in_features, out_features in sizes:
            kind = LinearKind(in_features, out_features)
            adapters = random_adapters(kind, each, ranks_of_base())
            x, y = (torch.randn(ROWS_OF_BASE, size).to(each) for size in (in_features, out_features))
            for batch, entries in BATCHES.items():
                mapping = LoraMapping(entries, [1] * ROWS_OF_BASE)
                expected = defined(x, y, adapters, mapping)
                moved = converted(adapters, device=device)
                for name, lora in (implementations(device) | {"dispatch": dispatched}).items():
                    with torch.no_grad():
                        z = lora(x.to(device), y.to(device, copy=True), moved, mapping)
                    note(figures, name, batch, z, expected, each)
                gradient = torch.randn(y.shape).to(each)
                of_float64 = converted(adapters, dtype=torch.float64)
                wanted = graded(reference.lora, x.double(), y.double(), of_float64, mapping, gradient.double())
                lora = of_mapping(autograd.lora)
                got = graded(lora, x.to(device), y.to(device), moved, mapping, gradient.to(device))
                for one, other in zip(got, wanted, strict=True):
                    note(figures, "autograd and its gradients", batch, one, other, each)
    return figures


def errors_of_other_kinds(device: torch.device) -> dict[str, float]:
    """Return the largest errors on layers that are not linear, in float32."""
    figures: dict[str, float] = {}
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # on by default for convolutions
    try:
        for layer in (nn.Embedding(100, 48), nn.Conv1d(12, 24, 3), nn.Conv2d(12, 24, 3, groups=2)):
            name = type(layer).__name__
            kind = kind_of(layer)
            assert not isinstance(kind, str)
            adapters = random_adapters(kind, torch.float32, [max(2, r) for r in ranks_of_base()])
            shape = {"Embedding": (7,), "Conv1d": (12, 9), "Conv2d": (12, 6, 7)}[name]
            x = torch.randint(100, (ROWS_OF_BASE, *shape)) if name == "Embedding" else torch.randn(ROWS_OF_BASE, *shape)
            y = layer(x).detach()
            mapping = LoraMapping(BATCHES["blended"], [1] * ROWS_OF_BASE)
            expected, moved = defined(x, y, adapters, mapping), converted(adapters, device=device)
            for lora_name, lora in {"reference": reference.lora, "dispatch": dispatched}.items():
                with torch.no_grad():
                    z = lora(x.to(device), y.to(device, copy=True), moved, mapping)
                note(figures, f"{lora_name}, {name}", "blended", z, expected, torch.float32)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    return figures


def ranks_of_base() -> list[int]:
    return [RANKS[i % len(RANKS)] for i in range(ROWS_OF_BASE)]


def defined(x: Tensor, y: Tensor, adapters: LayerAdapters, mapping: LoraMapping) -> Tensor:
    """Return the definition's result in float64, on the CPU."""
    with torch.no_grad():
        return reference.lora(
            x.double() if x.is_floating_point() else x, y.double(), converted(adapters, dtype=torch.float64), mapping
        )


def graded(
    lora: Lora, x: Tensor, y: Tensor, adapters: LayerAdapters, mapping: LoraMapping, gradient: Tensor
) -> list[Tensor]:
    """Return an implementation's output and every gradient."""
    adapters = trainable(adapters)
    inputs = [x.detach().clone().requires_grad_(), *leaves(adapters)]
    z = lora(inputs[0], y, adapters, mapping)
    gradients = torch.autograd.grad(z, inputs, gradient, allow_unused=True)
    return [z.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True))]


def note(figures: dict[str, float], name: str, batch: str, z: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Keep an implementation's largest error, relative to the largest value expected."""
    error = float((z.cpu().double() - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= TOLERANCE[dtype], f"{name}, {batch}, {dtype}: an error of {error:.1e} of the largest value"
    key = f"{name}, {short(dtype)}"
    figures[key] = max(figures.get(key, 0.0), error)


# ---- adapters of one layer


def random_adapters(
    kind: LayerKind, dtype: torch.dtype, ranks: Sequence[int], device: torch.device = CPU
) -> LayerAdapters:
    """Return adapters of these ranks at one layer; their tensors are views, as those of loaded adapters are."""
    weights = []
    for i, r in enumerate(ranks):
        a, b = (torch.randn(shape) for shape in kind.shapes(r))
        a, b = (a / a.shape[1] ** 0.5).to(device, dtype), (b / r**0.5).to(device, dtype)
        weights.append(LoraWeights(a[:], b[:], 0.5 + i % 3))
    return LayerAdapters(kind, weights)


def converted(adapters: LayerAdapters, **to: Any) -> LayerAdapters:
    """Return adapters on another device or in another dtype."""
    pairs = [weights for weights in adapters.weights if weights]
    return LayerAdapters(adapters.kind, [LoraWeights(w.a.to(**to), w.b.to(**to), w.scaling) for w in pairs])


def trainable(adapters: LayerAdapters) -> LayerAdapters:
    """Return copies of adapters that autograd records."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    pairs = [weights for weights in adapters.weights if weights]
    return LayerAdapters(adapters.kind, [LoraWeights(copy(w.a), copy(w.b), w.scaling) for w in pairs])


def leaves(adapters: LayerAdapters) -> list[Tensor]:
    return [tensor for weights in adapters.weights if weights for tensor in (weights.a, weights.b)]
