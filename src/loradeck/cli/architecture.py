"""What a base is to llama.cpp, from a GGUF file's header or a transformers configuration. Knows no adapter."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loradeck.base.load import GIVE, SMOLLM2, SMOLLM2_HUB_ID, SMOLLM2_PACKAGE, quiet
from loradeck.errors import BaseModelError
from loradeck.lora.gguf import PLAIN, REORDERED, Architecture, names

# transformers' model_type -> llama.cpp's architecture, where they differ (conversion/ in llama.cpp)
CALLED = {"mistral": "llama", "gemma3_text": "gemma3"}


def architecture(source: str) -> Architecture:
    """Return the architecture of a folder, hub id, .gguf file or smollm2-135m.

    Raises:
        BaseModelError: nothing is there, it cannot be read, or the architecture is not known here.
    """
    path = _smollm2() if source in (SMOLLM2, SMOLLM2_HUB_ID) else Path(source).expanduser()
    name, is_gguf = path.as_posix(), path.suffix.lower() == ".gguf"
    if not path.exists() and (is_gguf or "/" not in name):  # a misspelt name should not send its reader to the hub
        raise BaseModelError(f"no base at {source!r}", hint=GIVE)
    try:
        return _of_file(path) if is_gguf else _of_model(name)
    except BaseModelError:
        raise
    except Exception as error:  # what strangers' files make gguf and transformers raise has no common class
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BaseModelError(f"{source} cannot be read: {line}", hint=GIVE) from error


def _smollm2() -> Path:
    package = find_spec(SMOLLM2_PACKAGE)
    folders = package.submodule_search_locations if package else None
    return next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), Path(SMOLLM2_HUB_ID))


def _of_file(file: Path) -> Architecture:
    from gguf import GGUFReader, Keys

    reader = GGUFReader(file)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return field.contents() if field else None

    name = _known(value(Keys.General.ARCHITECTURE), file)
    heads = value(Keys.Attention.HEAD_COUNT.format(arch=name))
    shapes = {
        tensor.name: tuple(int(n) for n in reversed(tensor.shape))
        for tensor in reader.tensors
        if tensor.name.endswith(".weight")
    }
    return Architecture(name, heads, value(Keys.Attention.HEAD_COUNT_KV.format(arch=name)) or heads, shapes)


def _of_model(source: str) -> Architecture:
    with quiet():
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        name = _known(CALLED.get(config.model_type, config.model_type), source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    known = names(name, config.num_hidden_layers)
    shapes = {
        called: tuple(weight.shape)
        for path, weight in model.named_parameters()  # a tied weight comes once, as the embedding
        if (called := known.get_name(path, try_suffixes=(".weight",)))
    }
    heads = config.num_attention_heads
    return Architecture(name, heads, getattr(config, "num_key_value_heads", None) or heads, shapes)


def _known(name: str | None, source: object) -> str:
    if name in REORDERED | PLAIN:
        return str(name)
    raise BaseModelError(
        f"{source} is of architecture {name}, whose weights' order in llama.cpp is not known here",
        hint=f"Known are {', '.join(sorted(REORDERED | PLAIN))}; merge the adapter with `loradeck merge` instead.",
    )
