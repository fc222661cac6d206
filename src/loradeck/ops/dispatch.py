"""Picks the implementation of the update. The only place that does."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from loradeck.ops import autograd, cpu, portable
from loradeck.ops.layer_kinds import LinearKind
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.weights import LayerAdapters


def lora(x: Tensor, y: Tensor, adapters: LayerAdapters, mapping: LoraMapping, *, training: bool) -> Tensor:
    """y[t] + Σ_a w_a · scaling_a · B_a (A_a x[t]).

    x the layer's input · y the base's output for it, updated in place unless autograd records · dropout acts only when
    `training` -> a tensor like y.
    """
    segments = mapping.segments(adapters.kind.count(x) // mapping.total, x.device)
    if not segments.adapters:
        return y
    if not isinstance(adapters.kind, LinearKind):
        return portable.lora(x, y, adapters, segments, training=training)
    if torch.is_grad_enabled():
        return autograd.lora(x, y, adapters, segments, training=training)
    if training and adapters.drops():
        return portable.lora(x, y, adapters, segments, training=True)
    if cpu.takes(x, y):
        kernel, is_long = cpu.lora, cpu.is_long
    elif len(segments.adapters) > 1 and _gpu_takes(x, y):
        from loradeck.ops import gpu

        kernel, is_long = gpu.lora, gpu.is_long
    else:
        return portable.lora(x, y, adapters, segments)
    if not is_long(segments.longest, adapters.rank):
        return kernel(x, y, adapters, segments)
    lengths = zip(segments.adapters, segments.lengths, strict=True)
    long = [i for i, tokens in lengths if (weights := adapters.weights[i]) and is_long(tokens, weights.r)]
    short_segments, long_segments = segments.split(long)
    if short_segments.adapters:
        y = kernel(x, y, adapters, short_segments)
    return portable.lora(x, y, adapters, long_segments)


def warm_up(device: torch.device) -> None:
    """Compile and check the device's kernel now, not at the first forward with an adapter."""
    if device.type == "cpu":
        cpu.why_not_available()
    why_not_triton(device)


@cache
def why_not_triton(device: torch.device) -> str | None:
    """Return why the Triton kernels are not used on a device; None if they are."""
    if device.type != "cuda":
        return "is for GPUs"
    if find_spec("triton") is None:
        return "needs the package triton"
    from loradeck.ops import gpu

    return gpu.why_not_available(device)


def _gpu_takes(x: Tensor, y: Tensor) -> bool:
    return x.is_cuda and y.dtype == x.dtype != torch.float64 and why_not_triton(x.device) is None
