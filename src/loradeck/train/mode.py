"""Training mode and evaluation mode of a model, restored on exit."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from loradeck.errors import ConfigError

# Attributes that hold a dropout probability: nn.Dropout's, and those of attention in most transformers models.
DROPOUT_NAMES = ("p", "dropout", "attention_dropout")


@contextmanager
def training(model: PreTrainedModel, *, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Put a model in training mode within the block.

    The base's own dropout stays off: the base is frozen, and its masks would depend on what else is in the batch. With
    `gradient_checkpointing` each layer stores only its input and is recomputed in the backward pass: about a third
    more time, a fraction of the memory.

    Raises:
        ConfigError: the model does not support gradient checkpointing.
    """
    if gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} does not support gradient checkpointing", hint="Turn gradient_checkpointing off."
        )
    dropouts = [
        (module, name, vars(module)[name])
        for module in model.modules()
        for name in DROPOUT_NAMES
        if isinstance(vars(module).get(name), float)
    ]
    # transformers renamed these methods during version 5.
    prefix = (
        "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    )
    with _modes_restored(model):
        try:
            model.train()
            for module, name, _ in dropouts:
                setattr(module, name, 0.0)
            if gradient_checkpointing:
                enable = getattr(model, f"{prefix}_enable")
                enable(**{f"{prefix}_kwargs": {"use_reentrant": False}})
            yield
        finally:
            if gradient_checkpointing:
                getattr(model, f"{prefix}_disable")()
            for module, name, probability in dropouts:
                setattr(module, name, probability)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within the block."""
    with _modes_restored(model):
        model.eval()
        yield


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
