"""One rank and one scaling for all modules of an adapter, as vLLM and mlx-lm read them.

    rank     the highest; A gets rows of zeros, B columns of zeros
    scaling  s, that of most modules; another module's B becomes B · s_i / s

The update of each module stays the same. A product that its dtype cannot hold exactly is kept in float32.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from loradeck.errors import UnsupportedError
from loradeck.lora.adapter import Adapter
from loradeck.lora.manifest import TargetModule, config_of

MAX_VLLM_RANK = 512  # the highest --max-lora-rank


def uniform(adapter: Adapter) -> Adapter:
    """Return an adapter of one rank and one scaling, with the same updates.

    Raises:
        UnsupportedError: with every module that is a convolution.
    """
    convolutions = [f"{path} is a convolution" for path, site in adapter.sites.items() if site.kind == "conv"]
    if convolutions:
        raise UnsupportedError("only linear layers and embeddings can be converted to this format", convolutions)
    r = max(site.r for site in adapter.sites.values())
    scalings = Counter(site.scaling for site in adapter.sites.values() if site.scaling)
    scaling = scalings.most_common(1)[0][0] if scalings else 0.0
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    sites: dict[str, TargetModule] = {}
    with torch.inference_mode(False), torch.no_grad():
        for path, site in adapter.sites.items():
            a, b = adapter.pair(path)
            if site.scaling != scaling:
                a, b = _scaled(a, b, site.scaling / scaling)
            missing = r - site.r
            a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
            b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
            pairs[path] = a, b
            sites[path] = TargetModule(site.kind, r, scaling, tuple(a.shape), tuple(b.shape))
    origin = replace(adapter.origin, written=None)
    result = Adapter.with_sites(config_of(sites), sites, pairs, origin=origin)
    result.fan_in_fan_out = adapter.fan_in_fan_out
    return result


def for_vllm(adapter: Adapter, what: str) -> Adapter:
    """Return an adapter as vLLM reads it; `what` is its name in errors.

    Raises:
        UnsupportedError: it has convolutions, or a rank that vLLM does not take.
    """
    adapter = uniform(adapter)
    if adapter.config.r > MAX_VLLM_RANK:
        raise UnsupportedError(
            f"vLLM takes ranks up to {MAX_VLLM_RANK}, {what} has {adapter.config.r}",
            hint="Lower the rank with `loradeck convert`.",
            python=f"Pass rank={MAX_VLLM_RANK}.",
            cli=f"Add --rank {MAX_VLLM_RANK}.",
        )
    return adapter


def _scaled(a: Tensor, b: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    exact = b.double() * factor
    if torch.equal(exact.to(b.dtype).double(), exact):
        return a, exact.to(b.dtype)
    wide = torch.promote_types(b.dtype, torch.float32)
    return a.to(wide), exact.to(wide)
