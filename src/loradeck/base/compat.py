"""Names that differ between versions of transformers 5."""

from inspect import signature

from torch import nn


def cache_argument(model: type[nn.Module]) -> str:
    """Return the name of a model's KV cache: the argument of its forward, and the key in its output."""
    parameters = signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in parameters), "cache")
