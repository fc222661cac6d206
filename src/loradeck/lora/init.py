"""New adapters: their first values, their record. Knows initialisation; knows no files."""

import math
from collections.abc import Mapping
from importlib.metadata import version

import torch
from torch import Tensor, nn

from loradeck.lora.adapter import Adapter
from loradeck.lora.config import LoraConfig
from loradeck.lora.manifest import TargetModule
from loradeck.lora.peft import Origin
from loradeck.lora.targets import suffixes
from loradeck.ops.layer_kinds import Form


def adapter(
    model: nn.Module, config: LoraConfig, forms: Mapping[str, Form], generator: torch.Generator | None
) -> Adapter:
    """Return a trainable adapter for these modules that changes nothing yet.

    B is zero and A Kaiming-uniform (a = √5); for embeddings A is zero and B normal, so that A's rows, one per token,
    learn at full size. Both as PEFT. Values are float32 on half-precision bases: small updates would be lost.
    """
    sites: dict[str, TargetModule] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, form in forms.items():
        r = config.rank(path)
        a_shape, b_shape = form.shapes(r)
        sites[path] = TargetModule(form.kind, r, config.scaling(path, r), a_shape, b_shape)
        pairs[path] = _initial(form, a_shape, b_shape, _dtype(model.get_submodule(path)), generator)
    made = Adapter.with_sites(_resolved(model, config, sites), sites, pairs, trainable=True)
    made.fan_in_fan_out = any(form.fan_in_fan_out for form in forms.values())
    stamp(model, made)
    prepare(made, generator)
    return made


def _initial(
    form: Form,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        a, b = torch.zeros(a_shape, dtype=dtype), torch.zeros(b_shape, dtype=dtype)
        if form.kind == "embedding":
            return a, b.normal_(generator=generator)
        return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator), b


def _dtype(module: nn.Module) -> torch.dtype:
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return torch.promote_types(own, torch.float32)


def _resolved(model: nn.Module, config: LoraConfig, sites: Mapping[str, TargetModule]) -> LoraConfig:
    """Return the config with its targets and patterns spelled out: they match these modules and no other."""
    return config.of_modules({path: site.r for path, site in sites.items()}, suffixes(model, [*sites]))


def stamp(model: nn.Module, made: Adapter) -> None:
    """Record the base and the versions an adapter was made with, as far as the model tells."""
    names = (getattr(model, word, None) for word in ("base_name", "name_or_path"))
    name = next((name for name in names if isinstance(name, str) and name), None)
    # A language model's classes are named …ForCausalLM, and PEFT picks its wrapper class by this.
    task = "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else made.origin.task_type
    made.origin = Origin(name, made.origin.revision, task, made.origin.metadata)
    record = {"loradeck": version("loradeck"), "torch": str(torch.__version__)}
    fingerprint = getattr(model, "fingerprint", None)
    made.describe(**record, **({"base_fingerprint": fingerprint} if isinstance(fingerprint, str) else {}))


def prepare(made: Adapter, generator: torch.Generator | None) -> None:
    """Give a trainable adapter the random numbers of its dropout: its own, so that no neighbour shifts them."""
    if made.dropout is not None:
        seed = int(torch.randint(2**62, (), generator=generator))
        made.dropout.generator = torch.Generator().manual_seed(seed)
