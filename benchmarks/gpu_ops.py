"""Every way of the operation on a device: how far from float64, and how long. Knows layers' sizes; knows no model."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.harness import alternate
from benchmarks.suites.ops import all_stacked
from loradeck.ops import autograd, dispatch, packed, portable, reference, stacked
from loradeck.ops.layer_kinds import Form, LinearForm, form_of
from loradeck.ops.mapping import Entry, Mix
from loradeck.ops.operands import Operands
from loradeck.ops.weights import Pair

ROWS = 32
RANKS = (1, 4, 8, 16, 16, 64)
# Of the output's largest value. A number of bfloat16 has three digits, and is rounded between the two products.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
MIXES: dict[str, tuple[Entry, ...]] = {
    "distinct": tuple(((i, 1.0),) for i in range(ROWS)),
    "identical": (((3, 1.0),),) * ROWS,
    "in turns": tuple(((i % 3, 1.0),) if i % 4 else () for i in range(ROWS)),
    "blended": tuple(((i, 0.7), ((i + 5) % ROWS, -0.3)) if i % 5 else () for i in range(ROWS)),
}

Way = Callable[[Tensor, Tensor, Operands, Mix], Tensor]
Sizes = Sequence[tuple[int, int]]


def layers(model: nn.Module) -> Sizes:
    """Return the sizes (in, out) of a model's linear layers, its head apart."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    own = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return sorted({(module.in_features, module.out_features) for module in own})


def every_way(device: torch.device) -> dict[str, Way]:
    """All ways for linear layers outside autograd, those of few rows with every row in stacks."""

    def in_stacks(lora: Callable[..., Tensor]) -> Way:
        return lambda x, y, own, mix: lora(
            x, y, own, mix, all_stacked(mix, own, own.form.count(x) // mix.total, str(device))
        )

    ways: dict[str, Way] = {
        "reference": reference.lora,
        "segmented": portable.lora,
        "stacked": in_stacks(stacked.lora),
        "packed": packed.lora,
        "choose": lambda x, y, own, mix: dispatch.lora(x, y, own, mix, training=False),
    }
    if not dispatch.triton_problem(device):
        from loradeck.ops import gpu

        ways["triton"] = in_stacks(gpu.lora)
    return ways


def errors(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return each way's largest error on linear layers, against the definition in float64 on the CPU.

    Raises:
        AssertionError: one is beyond its tolerance.
    """
    found: dict[str, float] = {}
    for number in dict.fromkeys((torch.float32, dtype)):
        for inside, outside in sizes:
            form = LinearForm(inside, outside)
            pairs = pairs_of(form, number)
            x, y = (torch.randn(ROWS, size).to(number) for size in (inside, outside))
            for kind, entries in MIXES.items():
                mix = Mix(entries, (1,) * ROWS)
                wanted = defined(form, pairs, x, y, mix)
                own = Operands(form, moved(pairs, device))
                for name, way in every_way(device).items():
                    with torch.no_grad():
                        got = way(x.to(device), y.to(device, copy=True), own, mix)
                    note(found, name, kind, got, wanted, number)
                training(found, form, pairs, x, y, mix, device, kind)
    return found


def others(device: torch.device) -> dict[str, float]:
    """Return the same for layers that are not linear, in float32."""
    found: dict[str, float] = {}
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # for convolutions it is on
    for layer in (nn.Embedding(100, 48), nn.Conv1d(12, 24, 3), nn.Conv2d(12, 24, 3, groups=2)):
        form = form_of(layer)
        assert not isinstance(form, str)
        pairs = pairs_of(form, torch.float32, least=2)
        shape = {"Embedding": (7,), "Conv1d": (12, 9), "Conv2d": (12, 6, 7)}[type(layer).__name__]
        x = torch.randint(100, (ROWS, *shape)) if form.kind == "embedding" else torch.randn(ROWS, *shape)
        y = layer(x).detach()
        own, mix = Operands(form, moved(pairs, device)), Mix(MIXES["blended"], (1,) * ROWS)
        wanted = defined(form, pairs, x, y, mix)
        for name in ("reference", "segmented", "choose"):
            with torch.no_grad():
                got = every_way(device)[name](x.to(device), y.to(device, copy=True), own, mix)
            note(found, name, type(layer).__name__, got, wanted, torch.float32)
    torch.backends.cudnn.allow_tf32 = before
    return found


def training(
    found: dict[str, float], form: Form, pairs: Sequence[Pair], x: Tensor, y: Tensor, mix: Mix,
    device: torch.device, kind: str,
) -> None:  # fmt: skip
    """Note the errors of the way of training: its output and every gradient."""
    toward = torch.randn(y.shape).to(y.dtype)

    def graded(lora: Callable[..., Tensor], own: Sequence[Pair], x: Tensor, y: Tensor, to: Tensor) -> list[Tensor]:
        leaves = [pair.a for pair in own] + [pair.b for pair in own] + [x]
        for leaf in leaves:
            leaf.requires_grad_()
        z = lora(x, y, Operands(form, tuple(own)), mix)
        gradients = torch.autograd.grad(z, leaves, to, allow_unused=True)
        return [z.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True))]

    with torch.enable_grad():
        wanted = graded(reference.lora, doubled(pairs), x.double(), y.double(), toward.double())
        own = [replace(pair, a=pair.a.detach().clone(), b=pair.b.detach().clone()) for pair in moved(pairs, device)]
        got = graded(autograd.lora, own, x.to(device, copy=True), y.to(device), toward.to(device))
    for one, other in zip(got, wanted, strict=True):
        note(found, "fused and its gradients", kind, one, other, y.dtype)


def note(found: dict[str, float], name: str, kind: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    error = float((got.cpu().double() - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    assert error <= TOLERANCE[dtype], f"{name}, {kind}, {dtype}: off by {error:.1e} of the largest value"
    key = f"{name}, {str(dtype).removeprefix('torch.')}"
    found[key] = max(found.get(key, 0.0), error)


def ways(sizes: Sizes, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    """Return the microseconds of each way on ROWS rows of as many adapters of r=16: which of them `choose` should take.

    Sixteen calls each time, on the pairs of sixteen layers: what a cache holds from the call before would flatter.
    """
    found: dict[str, float] = {}
    mix, count = Mix(MIXES["distinct"], (1,) * ROWS), 16
    for inside, outside in sizes:
        form = LinearForm(inside, outside)
        own = [Operands(form, moved(pairs_of(form, dtype, ranks=(16,)), device)) for _ in range(count)]
        x, y = (torch.randn(ROWS, size).to(device, dtype) for size in (inside, outside))
        chosen = {name: way for name, way in every_way(device).items() if name != "reference"}
        plan = all_stacked(mix, own[0], 1, str(device))
        for name, lora in (("stacked", stacked.lora), ("triton", _triton)):
            if name in chosen:
                chosen[name] = lambda x, y, own, mix, lora=lora, plan=plan: lora(x, y, own, mix, plan)

        def calls(way: Way, own: list[Operands] = own, x: Tensor = x, y: Tensor = y) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    for each in own:
                        way(x, y, each, mix)

            return run

        seconds = alternate({name: calls(way) for name, way in chosen.items()}, rounds)
        found |= {f"{inside} to {outside}, {name} (us)": 1e6 * each / count for name, each in seconds.items()}
    return found


def _triton(*arguments: object) -> Tensor:
    from loradeck.ops import gpu

    return gpu.lora(*arguments)  # type: ignore[arg-type]


def pairs_of(form: Form, dtype: torch.dtype, *, ranks: Sequence[int] = RANKS, least: int = 1) -> tuple[Pair, ...]:
    pairs = []
    for i in range(ROWS):
        r = max(ranks[i % len(ranks)], least)
        a, b = form.shapes(r)
        pairs.append(Pair((torch.randn(a) / a[1] ** 0.5).to(dtype), (torch.randn(b) / r**0.5).to(dtype), 0.5 + i % 3))
    return tuple(pairs)


def moved(pairs: Sequence[Pair], device: torch.device) -> tuple[Pair, ...]:
    return tuple(replace(pair, a=pair.a.to(device), b=pair.b.to(device)) for pair in pairs)


def doubled(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    return tuple(replace(pair, a=pair.a.double(), b=pair.b.double()) for pair in pairs)


def defined(form: Form, pairs: Sequence[Pair], x: Tensor, y: Tensor, mix: Mix) -> Tensor:
    """The definition in float64, on the CPU."""
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        return reference.lora(x, y.double(), Operands(form, doubled(pairs)), mix)
