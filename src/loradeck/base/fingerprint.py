"""The fingerprint of a base: a hash that tells models apart in milliseconds."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loradeck.base.quantised import QuantisedWeight

SAMPLED = 1024  # values read from each tensor: about a megabyte in all, whatever the size of the base


def fingerprint(model: nn.Module) -> str:
    """Return the sha256, in hex, of the model's class, its parameters' names and shapes, and a sample of their values.

    At most 1024 values of each parameter are read, at an even stride, and rounded to bf16, so one base has the same
    fingerprint in fp32 and bf16 and on any device. Tied weights count once, under their first name.

    It does not notice a change that misses the sample or vanishes in bf16, nor one outside the parameters (a buffer, a
    setting such as the RoPE base). In fp16 the fingerprint may differ, because small weights underflow. It tells bases
    apart; it is no protection against forgery.
    """
    return fingerprint_of(type(model).__name__, sorted(model.named_parameters()))


def fingerprint_of(kind: str, parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return the fingerprint of a model of this class with these parameters, sorted by name.

    A quantised weight counts as the plain one that it was made from or, without one, by its values.
    """
    digest = hashlib.sha256(kind.encode())
    for name, parameter in parameters:
        shape = parameter.quantised.shape if isinstance(parameter, QuantisedWeight) else parameter.shape
        digest.update(f"\n{name} {list(shape)}\n".encode())
        digest.update(sample(parameter).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sample(parameter: Tensor) -> Tensor:
    """Return the values that count, at most 1024, in bf16."""
    if isinstance(parameter, QuantisedWeight):
        if parameter.sample is not None:
            return parameter.sample
        values = parameter.quantised.values(_index(parameter.quantised.shape))
    else:
        values = parameter.detach().reshape(-1)[_index(parameter.shape).to(parameter.device)]
    return values.to(torch.bfloat16).cpu() + 0  # -0 becomes 0: blocks have only one zero


def _index(shape: torch.Size) -> Tensor:
    size = shape.numel()
    return torch.arange(0, size, max(1, size // SAMPLED))[:SAMPLED]
