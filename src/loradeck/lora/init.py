"""New adapters: their initial values and metadata."""

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

import torch
from torch import Tensor, nn

from loradeck.errors import TargetError
from loradeck.lora.adapter import Adapter
from loradeck.lora.config import LoraConfig
from loradeck.lora.manifest import TargetModule
from loradeck.lora.peft import Origin
from loradeck.lora.saved_modules import initial
from loradeck.lora.targets import suffixes, task_heads
from loradeck.lora.whole_model import module_names, paths_in_files
from loradeck.ops.layer_kinds import LayerKind

TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
"""PEFT's name of a task, by the end of the name of the class that computes it."""


def with_head(model: nn.Module, config: LoraConfig, num_labels: int | None) -> LoraConfig:
    """Return a config that saves the model's head, if it names none and the adapter needs one of its own.

    That is so if the base lacks weights, or the number of labels is given.
    """
    if config.modules_to_save or not (num_labels or vars(model).get("missing_weights")):
        return config
    return replace(config, modules_to_save=task_heads(model))


def adapter(
    model: nn.Module,
    config: LoraConfig,
    kinds: Mapping[str, LayerKind],
    generator: torch.Generator | None,
    *,
    num_labels: int | None = None,
) -> Adapter:
    """Return a trainable adapter for these modules that does not change the output yet.

    B is zero and A Kaiming-uniform (a = √5); for embeddings A is zero and B normal, so that the rows of A, one per
    token, learn at full size. Both as in PEFT. On half-precision bases the adapter is float32: small updates would be
    lost.
    """
    sites: dict[str, TargetModule] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, kind in kinds.items():
        r = config.rank(path)
        a_shape, b_shape = kind.shapes(r)
        sites[path] = TargetModule(kind.name, r, config.scaling(path, r), a_shape, b_shape)
        pairs[path] = _initial(kind, a_shape, b_shape, _dtype(model.get_submodule(path)), generator)
    saved = _saved(model, config, num_labels, generator)
    new = Adapter.with_sites(config, sites, pairs, saved=saved, trainable=True)
    new.fan_in_fan_out = any(kind.fan_in_fan_out for kind in kinds.values())
    stamp(model, new)
    prepare(new, generator)
    return new


def _initial(
    kind: LayerKind,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        a, b = torch.zeros(a_shape, dtype=dtype), torch.zeros(b_shape, dtype=dtype)
        if kind.name == "embedding":
            return a, b.normal_(generator=generator)
        return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator), b


def _saved(
    model: nn.Module, config: LoraConfig, num_labels: int | None, generator: torch.Generator | None
) -> dict[str, dict[str, Tensor]]:
    """Return the initial parameters of the modules of modules_to_save.

    Raises:
        TargetError: there is none.
    """
    paths = dict.fromkeys(
        module[0] for path, _ in model.named_parameters() if (module := config.saved_module(path)) is not None
    )
    if config.modules_to_save and not paths:
        raise TargetError(
            f"modules_to_save {[*config.modules_to_save]} match no module of this model",
            hint="Load the base for a task that has a head.",
        )
    std = getattr(getattr(model, "config", None), "initializer_range", None) or 0.02
    missing = vars(model).get("missing_weights", frozenset())
    lacking = sorted(name for name in missing if not config.saved_module(name))
    if lacking:
        raise TargetError(
            f"the base lacks {', '.join(lacking)}",
            hint="Name their modules in modules_to_save, so that the adapter has its own.",
        )
    last = next(reversed(paths), None)  # which gives the labels; a pooler before it keeps its width
    with torch.inference_mode(False), torch.no_grad():
        return {
            path: initial(
                model.get_submodule(path),
                num_labels if path == last else None,
                std,
                {name.removeprefix(f"{path}.") for name in missing if name.startswith(f"{path}.")},
                generator,
            )
            for path in paths
        }


def _dtype(module: nn.Module) -> torch.dtype:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return torch.promote_types(dtype, torch.float32)


def stamp(model: nn.Module, adapter: Adapter) -> None:
    """Record the base and the versions that an adapter was created with, as far as the model has them.

    Its config gets targets and patterns that match exactly its modules, as files spell them.
    """
    adapter.paths = paths_in_files(model, adapter.sites)
    targets = suffixes(module_names(model), [adapter.paths.get(path, path) for path in adapter.sites])
    ranks = {path: site.r for path, site in adapter.sites.items()}
    adapter.config = adapter.config.of_modules(ranks, targets, adapter.paths)
    names = (getattr(model, attribute, None) for attribute in ("base_name", "name_or_path"))
    name = next((name for name in names if isinstance(name, str) and name), None)
    # PEFT selects its wrapper class by the task type.
    kind = type(model).__name__
    task = next((task for end, task in TASK_TYPES.items() if kind.endswith(end)), adapter.origin.task_type)
    adapter.origin = Origin(name, adapter.origin.revision, task, adapter.origin.metadata)
    record = {"loradeck": version("loradeck"), "torch": str(torch.__version__)}
    base = {"base_fingerprint": "fingerprint", "base_quantisation": "base_quantisation"}
    facts = {key: getattr(model, attribute, None) for key, attribute in base.items()}
    adapter.describe(**record, **{key: fact for key, fact in facts.items() if isinstance(fact, str)})


def prepare(adapter: Adapter, generator: torch.Generator | None) -> None:
    """Give a trainable adapter's dropout its own generator, so that other adapters do not affect it."""
    if adapter.dropout is not None:
        seed = int(torch.randint(2**62, (), generator=generator))
        adapter.dropout.generator = torch.Generator().manual_seed(seed)
