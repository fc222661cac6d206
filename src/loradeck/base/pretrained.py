"""Models and tokenizers of transformers, loaded in silence; whatever goes wrong is a BaseModelError."""

import ctypes
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub.utils as hub
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from loradeck.base.checkpoint import COMPLETE, Checkpoint
from loradeck.base.source import HINT
from loradeck.base.task import CLASSES, CONFIGS, clear, lacks_only_head, set_labels
from loradeck.errors import BaseModelError, LoradeckError

SAVE_PART = "Save its language model and its tokenizer in a folder of their own, and give that folder."
OTHER_TASK = {
    "python": 'Or load it for another task, as task="classify".',
    "cli": "Or, where there is the flag, give its task, such as --task classify.",
}


def pretrained_model(
    source: str | Path, where: str, dtype: torch.dtype, task: str = "generate", **gguf: Any
) -> PreTrainedModel:
    """Load a model for a task; every weight must be in its files, but those of a head that an adapter can bring.

    Raises:
        BaseModelError: it is another kind of model, or lacks weights.
    """
    config = pretrained_config(source, where, gguf.get("gguf_file"), task)
    if type(config) not in CONFIGS[task]:
        is_part = task != "generate" and config.get_text_config() is not config
        raise BaseModelError(
            f"{source} is a {config.model_type}; transformers has no such model for the task {task}",
            hint=SAVE_PART if is_part else HINT,
            **(OTHER_TASK if task == "generate" else {}),
        )
    set_labels(config, task)
    model, report = CLASSES[task].from_pretrained(
        where,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **gguf,
    )
    if task != "generate" and lacks_only_head(model, report["missing_keys"]):
        clear(model, report["missing_keys"])
    else:
        _check(source, model, report)
    return model


def model_of_checkpoint(
    source: str | Path, checkpoint: Checkpoint, config: PretrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """Load a causal language model from some tensors of a checkpoint; every weight must be among them.

    Raises:
        BaseModelError: weights are missing.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with checkpoint.slices() as slices:
        model, report = kind.from_pretrained(
            None, config=config, state_dict=slices, dtype=dtype, output_loading_info=True
        )
    _check(source, model, report)
    if (settings := checkpoint.generation_config()) is not None:
        model.generation_config = settings
    return model


def _check(source: str | Path, model: PreTrainedModel, report: Mapping[str, Collection[str]]) -> None:
    if report["missing_keys"]:  # transformers would initialise them at random
        raise BaseModelError(
            f"{source} lacks weights of its {type(model).__name__}",
            sorted(report["missing_keys"]),
            hint=COMPLETE,
            **(OTHER_TASK if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else {}),
        )


def pretrained_config(
    source: str | Path, where: str, gguf_file: str | None = None, task: str = "generate"
) -> PretrainedConfig:
    """Load the configuration of a model for a task.

    Raises:
        BaseModelError: it is another kind of model.
    """
    config = AutoConfig.from_pretrained(where, trust_remote_code=False, gguf_file=gguf_file)
    masked = task == "generate" and any("MaskedLM" in name for name in config.architectures or ())
    if config.is_encoder_decoder or masked:
        raise BaseModelError(
            f"{source} is a {config.model_type}, not a decoder-only language model", hint=HINT, **OTHER_TASK
        )
    return config


def pretrained_tokenizer(source: str | Path, where: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer; the options are those of transformers' `from_pretrained`.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    hint = "Put the model's own tokenizer.json and tokenizer_config.json there."
    with base_errors(f"the tokenizer of {source}", hint):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
        if tokenizer is None:
            raise FileNotFoundError("it is missing")
    _return_freed_memory()  # to parse a vocabulary takes several times what it holds: 190 MB that Gemma 3's would keep
    return tokenizer


def _return_freed_memory() -> None:
    """Make glibc return to the system what is free."""
    with suppress(OSError, AttributeError, TypeError):  # of another allocator, or another system
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def base_errors(source: str | Path, hint: str = HINT) -> Iterator[None]:
    """Raise errors that are not ours as a BaseModelError: what untrusted files make transformers raise has no class."""
    try:
        yield
    except LoradeckError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise BaseModelError(
                f"{source} needs its own code, which loradeck never runs",
                hint="Use a model whose architecture is part of transformers.",
            ) from error
        raise BaseModelError(f"cannot load {source}: {first_line(error)}", hint=hint) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().partition("\n")[0].rstrip(" :") or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, logs and warnings, but not the progress of a download."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    downloads = not hub.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if downloads:
            hub.enable_progress_bars()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
