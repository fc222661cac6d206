"""A model while it is trained on: what is on, what is off, and how it was before. Knows modules; knows no adapters."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from loradeck.errors import ConfigError

# Where modules keep the share they drop: nn.Dropout, and attention of most models of transformers.
SHARES = ("p", "dropout", "attention_dropout")


@contextmanager
def training(model: PreTrainedModel, *, gradient_checkpointing: bool = False) -> Iterator[None]:
    """Put a model in training mode, and give it back as it was.

    The base's own dropout stays off: it is frozen, and its masks would depend on who else is in the batch. With
    `gradient_checkpointing` each layer keeps only its input and is computed again in the backward pass: about a third
    more time, a fraction of the memory.

    Raises:
        ConfigError: the model cannot checkpoint.
    """
    if gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} cannot checkpoint gradients", hint="Turn gradient_checkpointing off."
        )
    shares = [
        (module, name, vars(module)[name])
        for module in model.modules()
        for name in SHARES
        if isinstance(vars(module).get(name), float)
    ]
    # transformers changed the word during version 5.
    word = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    with _kept(model):
        try:
            model.train()
            for module, name, _ in shares:
                setattr(module, name, 0.0)
            if gradient_checkpointing:
                enable = getattr(model, f"{word}_enable")
                enable(**{f"{word}_kwargs": {"use_reentrant": False}})
            yield
        finally:
            if gradient_checkpointing:
                getattr(model, f"{word}_disable")()
            for module, name, share in shares:
                setattr(module, name, share)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and give it back as it was."""
    with _kept(model):
        model.eval()
        yield


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Give every module back the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
