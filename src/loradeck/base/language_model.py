"""The language model of a multimodal checkpoint: its configuration, where its tensors lie, and what the rest is.

Nothing here knows a family of models by name, but for those whose language model is another's: see `PLAIN`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from loradeck.base.checkpoint import COMPLETE, Checkpoint, files_of, settings_of
from loradeck.base.source import HINT
from loradeck.errors import BaseModelError

# Language models for which transformers has no class: on text alone, whose positions in time, height and width are
# the same, their rotary embedding is that of the plain model.
PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
MROPE = ("type", "mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class LanguageModel:
    """The language model of a multimodal checkpoint.

    Attributes:
        config: of the language model alone.
        checkpoint: its tensors, by the names that they have in it.
        whole_paths: where its parts lie in the whole model: paths of modules here -> there.
        left_out: the paths of all other modules of the whole model.
    """

    config: PretrainedConfig
    checkpoint: Checkpoint
    whole_paths: Mapping[str, str]
    left_out: tuple[str, ...]

    def mark(self, model: nn.Module) -> None:
        """Give a model of it `whole_paths` and `left_out` as attributes of its own, by which adapters are read."""
        vars(model).update(whole_paths=self.whole_paths, left_out=self.left_out)


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a configuration's language model is only a part of the model."""
    return config.get_text_config() is not config


def language_model(source: str | Path, whole: PretrainedConfig, folder: Path) -> LanguageModel:
    """Find the language model in the folder of a multimodal checkpoint, by the names of its tensors.

    Raises:
        BaseModelError: its weights are not there, or not clearly; transformers has no class for it.
    """
    keys = [*files_of(folder)]
    config = _text_config(source, whole)
    model = _on_meta(AutoModelForCausalLM, config)
    body, head = _body(model), _head(model)
    prefix = _prefix(source, model, body, keys)
    inner = model.get_submodule(body)
    inside = [name for name, _ in (*inner.named_children(), *inner.named_parameters(recurse=False))]
    parts = {f"{body}.{name}": prefix + name for name in inside}
    if head is not None:
        heads = [above + head for above in _above(prefix) if any(_under(key, above + head) for key in keys)]
        if len(heads) > 1:
            raise BaseModelError(f"{source} has two heads of its language model: {' and '.join(heads)}", hint=HINT)
        if heads:
            parts[head] = heads[0]
        config.tie_word_embeddings = not heads and bool(getattr(whole, "tie_word_embeddings", False))
    names = {name + key.removeprefix(place): key for key in keys for name, place in parts.items() if _under(key, place)}
    checkpoint = Checkpoint(folder, settings_of(config), names)
    if type(whole) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return LanguageModel(config, checkpoint, {body: prefix.removesuffix(".")}, ())
    full = _on_meta(AutoModelForMultimodalLM, whole)
    paths = {body: _body(full)}
    if head is not None and (theirs := _head(full)) is not None:
        paths[head] = theirs
    everything = [path for path, _ in full.named_modules() if path]
    left_out = (path for path in everything if not any(_under(path, each) for each in paths.values()))
    return LanguageModel(config, checkpoint, paths, tuple(left_out))


def _text_config(source: str | Path, whole: PretrainedConfig) -> PretrainedConfig:
    config = whole.get_text_config()
    values = config.to_dict()
    kind = PLAIN.get(values.pop("model_type"), config.model_type)
    if kind != config.model_type:
        rope = {key: value for key, value in values.pop("rope_parameters").items() if key not in MROPE}
        config = AutoConfig.for_model(kind, **values, rope_parameters=rope)
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        config = type(config).from_dict(values)  # the whole model's own stays as it is
    else:
        raise BaseModelError(
            f"{source} is a {whole.model_type}; transformers has no causal language model for its {kind}", hint=HINT
        )
    if (settings := getattr(whole, "quantization_config", None)) is not None:
        config.quantization_config = settings
    return config


def _on_meta(kind: type[AutoModelForCausalLM | AutoModelForMultimodalLM], config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config)
    return model


def _path(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _body(model: PreTrainedModel) -> str:
    """Return the path of the module that holds the embedding and the layers."""
    return str(_path(model, model.get_input_embeddings())).rpartition(".")[0]


def _head(model: PreTrainedModel) -> str | None:
    return _path(model, model.get_output_embeddings())


def _prefix(source: str | Path, model: PreTrainedModel, body: str, keys: list[str]) -> str:
    """Return what stands before the names of the body's tensors in the checkpoint: the prefix that most are under."""
    embedding = f"{_path(model, model.get_input_embeddings())}.weight".removeprefix(f"{body}.")
    tails = [name for name, _ in model.get_submodule(body).named_parameters()]
    names = {*keys}
    counts = {
        prefix: sum(prefix + tail in names for tail in tails)
        for key in keys
        if key == embedding or key.endswith("." + embedding)
        for prefix in [key.removesuffix(embedding)]
    }
    best = [prefix for prefix, count in counts.items() if count == max(counts.values())]
    if not best:
        raise BaseModelError(
            f"{source} has no language model: none of its {len(keys)} tensors is an {embedding}", hint=COMPLETE
        )
    if len(best) > 1:
        raise BaseModelError(
            f"{source} has more than one language model, under {' and '.join(map(repr, sorted(best)))}",
            hint="Give a checkpoint that has one.",
        )
    return best[0]


def _above(prefix: str) -> list[str]:
    """Return the prefixes of the modules that a prefix lies in, the nearest first: a.b. -> a. and the empty one."""
    parts = prefix.split(".")[:-1]
    return ["".join(part + "." for part in parts[:count]) for count in reversed(range(len(parts)))] or [""]


def _under(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent + ".")
