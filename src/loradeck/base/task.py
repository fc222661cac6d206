"""What a base is loaded for: the class of transformers that computes it, and the head, which the base may lack."""

from collections.abc import Collection, Container, Mapping
from typing import Literal, TypeAlias, get_args

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from loradeck.errors import ConfigError

Task: TypeAlias = Literal["generate", "classify", "tokens", "reward", "embed"]
TASKS: tuple[str, ...] = get_args(Task)
POOLING = tuple(task for task in TASKS if task != "generate")
CLASSES: Mapping[str, type] = {
    "generate": AutoModelForCausalLM,
    "classify": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
    "embed": AutoModel,
}
CONFIGS: Mapping[str, Container[type]] = {
    "generate": MODEL_FOR_CAUSAL_LM_MAPPING,
    "classify": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "tokens": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "reward": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "embed": MODEL_MAPPING,
}
"""The configurations of which these classes make a model."""
POOLER = "pooler."  # of a model that was pretrained without one, as DeBERTa


def lacks_only_head(model: PreTrainedModel, missing: set[str]) -> bool:
    """Return whether weights that a checkpoint lacks are all those of the head, which an adapter can bring."""
    prefix = f"{model.base_model_prefix}."
    return not any(name.startswith(prefix) and not name.startswith(prefix + POOLER) for name in missing)


def clear(model: PreTrainedModel, missing: set[str]) -> None:
    """Set weights that a checkpoint lacks to zero, where transformers has drawn them, and note them in the model.

    A base without a head gives 0 for every label. The attribute `missing_weights` holds the names.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in missing:
            parameters[name].zero_()
    vars(model)["missing_weights"] = frozenset(missing)


def set_labels(config: PretrainedConfig, task: str) -> None:
    """Give a reward model its one output."""
    if task == "reward":
        config.num_labels = 1


def check_task(task: str, allowed: Collection[str]) -> None:
    """Check that a base was loaded for one of these tasks.

    Raises:
        ConfigError: it was loaded for another.
    """
    if task not in allowed:
        words = " or ".join(allowed)
        raise ConfigError(
            f"the base was loaded for the task {task}, and this needs {words}",
            python=f"Load it with Base.load(base, task={next(iter(allowed))!r}).",
            cli=f"As in --task {next(iter(allowed))}.",
        )
