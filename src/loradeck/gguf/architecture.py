"""llama.cpp's architecture of a base, from a GGUF file's header or a transformers configuration."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from loradeck.base import SMOLLM2
from loradeck.base.gguf_file import GgufFile
from loradeck.base.load import smollm2_file
from loradeck.base.pretrained import quiet
from loradeck.base.source import HINT, SMOLLM2_HUB_ID, close_names, reach
from loradeck.errors import BaseModelError
from loradeck.hub import is_hub_id
from loradeck.llamacpp import MODEL_TYPES, PLAIN, REORDERED, Architecture, names, text_path

# transformers' model_type -> llama.cpp's name, if they differ (conversion/ in llama.cpp)
LLAMACPP_NAMES = {"mistral": "llama", **{theirs: name for name, theirs in MODEL_TYPES.items()}}


def read_architecture(source: str) -> Architecture:
    """Return the architecture of a folder, hub id, .gguf file or smollm2-135m.

    Raises:
        BaseModelError: nothing is there, it cannot be read, or its architecture is not supported.
    """
    is_smollm2 = source in (SMOLLM2, SMOLLM2_HUB_ID)
    where = str(smollm2_file() or SMOLLM2_HUB_ID) if is_smollm2 else source
    path = Path(where).expanduser()
    name, is_gguf = path.as_posix(), path.suffix.lower() == ".gguf"
    if not path.exists():
        if is_gguf or not is_hub_id(where):
            raise BaseModelError(f"no base at {source!r}", hint=close_names(source) or HINT)
        name = reach(name)
    try:
        return _of_file(path) if is_gguf else _of_model(name)
    except BaseModelError:
        raise
    except Exception as error:  # what untrusted files make gguf and transformers raise has no common class
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BaseModelError(f"cannot read {source}: {line}", hint=HINT) from error


def architecture_of(config: PretrainedConfig, source: object) -> tuple[Architecture, PreTrainedModel]:
    """Return the architecture of a configuration, and a model of it on the meta device.

    Raises:
        BaseModelError: its architecture is not supported.
    """
    name = _supported(LLAMACPP_NAMES.get(config.model_type, config.model_type), source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()  # a multimodal base's language model
    tensor_names = names(name, text.num_hidden_layers)
    shapes = {
        tensor_name: tuple(weight.shape)
        for path, weight in model.named_parameters()  # a tied weight appears once, as the embedding
        if (tensor_name := tensor_names.get_name(text_path(path), try_suffixes=(".weight",)))
    }
    heads = text.num_attention_heads
    return Architecture(name, heads, getattr(text, "num_key_value_heads", None) or heads, shapes), model


def _of_file(path: Path) -> Architecture:
    with GgufFile(path) as file:
        name = _supported(file.settings.get("general.architecture"), path)
        heads: Any = file.settings.get(f"{name}.attention.head_count")
        kv_heads: Any = file.settings.get(f"{name}.attention.head_count_kv") or heads
        shapes = {tensor.name: tensor.shape for tensor in file.tensors.values() if tensor.name.endswith(".weight")}
    return Architecture(name, heads, kv_heads, shapes)


def _of_model(source: str) -> Architecture:
    with quiet():
        architecture, _ = architecture_of(AutoConfig.from_pretrained(source, trust_remote_code=False), source)
    return architecture


def _supported(name: str | None, source: object) -> str:
    if name in REORDERED | PLAIN:
        return str(name)
    raise BaseModelError(
        f"cannot export for architecture {name} of {source}",
        hint=f"Supported: {', '.join(sorted(REORDERED | PLAIN))}. For others, use `loradeck merge`.",
    )
