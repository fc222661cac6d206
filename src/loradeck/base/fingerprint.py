"""The fingerprint of a base: a hash that tells models apart in milliseconds."""

import hashlib
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

Sample: TypeAlias = tuple[tuple[int, ...], Tensor]  # a parameter's shape, and some of its values
SAMPLED = 1024  # values read from each tensor: about a megabyte in all, whatever the size of the base


def fingerprint(model: nn.Module) -> str:
    """Return the sha256, in hex, of the model's class, its parameters' names and shapes, and a sample of their values.

    At most 1024 values of each parameter are read, at an even stride, and rounded to bf16, so one base has the same
    fingerprint in fp32 and bf16 and on any device. Tied weights count once, under their first name.

    It does not notice a change that misses the sample or vanishes in bf16, nor one outside the parameters (a buffer, a
    setting such as the RoPE base). In fp16 the fingerprint may differ, because small weights underflow. It tells bases
    apart; it is no protection against forgery.
    """
    samples = ((name, sample(parameter)) for name, parameter in sorted(model.named_parameters()))
    return fingerprint_of(type(model).__name__, samples)


def fingerprint_of(kind: str, samples: Iterable[tuple[str, Sample]]) -> str:
    """Return the fingerprint of a model of this class with these samples of its parameters, sorted by name."""
    digest = hashlib.sha256(kind.encode())
    for name, (shape, values) in samples:
        digest.update(f"\n{name} {[*shape]}\n".encode())
        digest.update(values.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sample(parameter: Tensor) -> Sample:
    """Return the shape of a parameter, and the values of it that the fingerprint reads."""
    step, count = stride(parameter.numel())
    return tuple(parameter.shape), parameter.detach().reshape(-1)[::step][:count].clone()


def stride(size: int) -> tuple[int, int]:
    """Return the distance between the values that are read of a parameter of this size, and the most that are."""
    return max(1, size // SAMPLED), SAMPLED
