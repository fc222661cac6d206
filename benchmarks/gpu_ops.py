"""Every implementation of the update on a device: its error against float64, and its time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.record import in_turns
from loradeck.ops import autograd, dispatch, portable, reference
from loradeck.ops.layer_kinds import LayerKind, LinearKind, kind_of
from loradeck.ops.mapping import AdapterWeights, LoraMapping
from loradeck.ops.weights import LayerAdapters, LoraWeights

ROWS = 32
RANKS = (1, 4, 8, 16, 16, 64)
# Of the output's largest value. A number of bfloat16 has three digits, and is rounded between the two products.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
BATCHES: dict[str, tuple[AdapterWeights, ...]] = {
    "distinct": tuple(((i, 1.0),) for i in range(ROWS)),
    "identical": (((3, 1.0),),) * ROWS,
    "alternating": tuple(((i % 3, 1.0),) if i % 4 else () for i in range(ROWS)),
    "blended": tuple(((i, 0.7), ((i + 5) % ROWS, -0.3)) if i % 5 else () for i in range(ROWS)),
}

Lora = Callable[[Tensor, Tensor, LayerAdapters, LoraMapping], Tensor]
Sizes = Sequence[tuple[int, int]]


def layers(model: nn.Module) -> Sizes:
    """Return the sizes (in, out) of a model's linear layers, its head apart."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    own = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return sorted({(module.in_features, module.out_features) for module in own})


def of_mapping(kernel: Callable[..., Tensor]) -> Lora:
    """Return a kernel that takes the mapping in place of its segments."""

    def lora(x: Tensor, y: Tensor, adapters: LayerAdapters, mapping: LoraMapping) -> Tensor:
        return kernel(x, y, adapters, mapping.segments(adapters.kind.count(x) // mapping.total, x.device))

    return lora


def implementations(device: torch.device) -> dict[str, Lora]:
    """All implementations for linear layers outside autograd."""
    kernels: dict[str, Lora] = {
        "reference": reference.lora,
        "portable": of_mapping(portable.lora),
        "dispatch": lambda x, y, adapters, mapping: dispatch.lora(x, y, adapters, mapping, training=False),
    }
    if dispatch.why_not_triton(device) is None:
        from loradeck.ops import gpu

        kernels["triton"] = of_mapping(gpu.lora)
    return kernels


def errors(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return each way's largest error on linear layers, against the definition in float64 on the CPU.

    Raises:
        AssertionError: one is beyond its tolerance.
    """
    found: dict[str, float] = {}
    for number in dict.fromkeys((torch.float32, dtype)):
        for inside, outside in sizes:
            layer_kind = LinearKind(inside, outside)
            pairs = pairs_of(layer_kind, number)
            x, y = (torch.randn(ROWS, size).to(number) for size in (inside, outside))
            for kind, entries in BATCHES.items():
                mapping = LoraMapping(entries, (1,) * ROWS)
                wanted = defined(layer_kind, pairs, x, y, mapping)
                own = LayerAdapters(layer_kind, moved(pairs, device))
                for name, lora in implementations(device).items():
                    with torch.no_grad():
                        got = lora(x.to(device), y.to(device, copy=True), own, mapping)
                    note(found, name, kind, got, wanted, number)
                training(found, layer_kind, pairs, x, y, mapping, device, kind)
    return found


def others(device: torch.device) -> dict[str, float]:
    """Return the same for layers that are not linear, in float32."""
    found: dict[str, float] = {}
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # for convolutions it is on
    for layer in (nn.Embedding(100, 48), nn.Conv1d(12, 24, 3), nn.Conv2d(12, 24, 3, groups=2)):
        layer_kind = kind_of(layer)
        assert not isinstance(layer_kind, str)
        pairs = pairs_of(layer_kind, torch.float32, least=2)
        shape = {"Embedding": (7,), "Conv1d": (12, 9), "Conv2d": (12, 6, 7)}[type(layer).__name__]
        x = torch.randint(100, (ROWS, *shape)) if layer_kind.name == "embedding" else torch.randn(ROWS, *shape)
        y = layer(x).detach()
        own, mapping = LayerAdapters(layer_kind, moved(pairs, device)), LoraMapping(BATCHES["blended"], (1,) * ROWS)
        wanted = defined(layer_kind, pairs, x, y, mapping)
        for name in ("reference", "portable", "dispatch"):
            with torch.no_grad():
                got = implementations(device)[name](x.to(device), y.to(device, copy=True), own, mapping)
            note(found, name, type(layer).__name__, got, wanted, torch.float32)
    torch.backends.cudnn.allow_tf32 = before
    return found


def training(
    found: dict[str, float], layer_kind: LayerKind, pairs: Sequence[LoraWeights], x: Tensor, y: Tensor,
    mapping: LoraMapping, device: torch.device, kind: str,
) -> None:  # fmt: skip
    """Note the errors of the way of training: its output and every gradient."""
    toward = torch.randn(y.shape).to(y.dtype)

    def graded(
        lora: Callable[..., Tensor], own: Sequence[LoraWeights], x: Tensor, y: Tensor, to: Tensor
    ) -> list[Tensor]:
        leaves = [each.a for each in own] + [each.b for each in own] + [x]
        for leaf in leaves:
            leaf.requires_grad_()
        z = lora(x, y, LayerAdapters(layer_kind, tuple(own)), mapping)
        gradients = torch.autograd.grad(z, leaves, to, allow_unused=True)
        return [z.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True))]

    with torch.enable_grad():
        wanted = graded(reference.lora, doubled(pairs), x.double(), y.double(), toward.double())
        own = [replace(pair, a=pair.a.detach().clone(), b=pair.b.detach().clone()) for pair in moved(pairs, device)]
        got = graded(of_mapping(autograd.lora), own, x.to(device, copy=True), y.to(device), toward.to(device))
    for one, other in zip(got, wanted, strict=True):
        note(found, "autograd and its gradients", kind, one, other, y.dtype)


def note(found: dict[str, float], name: str, kind: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    error = float((got.cpu().double() - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    assert error <= TOLERANCE[dtype], f"{name}, {kind}, {dtype}: off by {error:.1e} of the largest value"
    key = f"{name}, {str(dtype).removeprefix('torch.')}"
    found[key] = max(found.get(key, 0.0), error)


def ways(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, rounds: int, settle: Callable[[], object]
) -> dict[str, float]:
    """Return the microseconds of each implementation on ROWS rows of as many adapters of r=16.

    Sixteen calls each time, on the weights of sixteen layers: what the cache holds from the call before would flatter.
    """
    found: dict[str, float] = {}
    mapping, count = LoraMapping(BATCHES["distinct"], (1,) * ROWS), 16
    for inside, outside in sizes:
        layer_kind = LinearKind(inside, outside)
        weights = [moved(pairs_of(layer_kind, dtype, ranks=(16,)), device) for _ in range(count)]
        adapters = [LayerAdapters(layer_kind, each) for each in weights]
        x, y = (torch.randn(ROWS, size).to(device, dtype) for size in (inside, outside))

        def calls(
            lora: Lora, adapters: list[LayerAdapters] = adapters, x: Tensor = x, y: Tensor = y
        ) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    for each in adapters:
                        lora(x, y, each, mapping)

            return run

        kernels = {name: calls(lora) for name, lora in implementations(device).items() if name != "reference"}
        seconds = in_turns(kernels, rounds, settle)
        found |= {f"{inside} to {outside}, {name} (us)": 1e6 * each / count for name, each in seconds.items()}
    return found


def pairs_of(
    layer_kind: LayerKind, dtype: torch.dtype, *, ranks: Sequence[int] = RANKS, least: int = 1
) -> tuple[LoraWeights, ...]:
    pairs = []
    for i in range(ROWS):
        r = max(ranks[i % len(ranks)], least)
        a, b = layer_kind.shapes(r)
        pairs.append(
            LoraWeights((torch.randn(a) / a[1] ** 0.5).to(dtype), (torch.randn(b) / r**0.5).to(dtype), 0.5 + i % 3)
        )
    return tuple(pairs)


def moved(pairs: Sequence[LoraWeights], device: torch.device) -> tuple[LoraWeights, ...]:
    """Return the weights on a device, as views: a loaded adapter's are."""
    return tuple(replace(pair, a=pair.a.to(device)[:], b=pair.b.to(device)[:]) for pair in pairs)


def doubled(pairs: Sequence[LoraWeights]) -> tuple[LoraWeights, ...]:
    return tuple(replace(pair, a=pair.a.double(), b=pair.b.double()) for pair in pairs)


def defined(layer_kind: LayerKind, pairs: Sequence[LoraWeights], x: Tensor, y: Tensor, mapping: LoraMapping) -> Tensor:
    """The definition in float64, on the CPU."""
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        return reference.lora(x, y.double(), LayerAdapters(layer_kind, doubled(pairs)), mapping)
