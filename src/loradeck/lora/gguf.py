"""Export an adapter as a LoRA file (GGUF) for llama.cpp.

The format is defined by its reader, llama.cpp's src/llama-adapter.cpp, and by convert_lora_to_gguf.py there. The file
has one alpha; the scaling of each pair is alpha / r, with the pair's own r.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from loradeck.disk import write_file
from loradeck.errors import AdapterError, UnsupportedError
from loradeck.llamacpp import EMBEDDING, HEAD, Architecture, names, text_path
from loradeck.lora.adapter import Adapter
from loradeck.lora.manifest import TargetModule


def export(
    adapter: Adapter, base: Architecture, file: Path, *, dtype: Literal["float32", "float16"] = "float32"
) -> float:
    """Write an adapter as a file for llama.cpp and this base, atomically, and return the file's alpha.

    Raises:
        UnsupportedError: with every module that llama.cpp cannot adapt.
        AdapterError: a value is too large for the dtype, or the file cannot be written.
    """
    import gguf

    weights = _weights(adapter.sites, base)
    alpha = _common_alpha(adapter.sites.values())
    try:
        with TemporaryDirectory() as folder:
            draft = Path(folder) / "adapter.gguf"
            writer = gguf.GGUFWriter(draft, base.name)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            for name, tensor in _tensors(adapter, weights, base, alpha):
                values = tensor.to(getattr(torch, dtype)).contiguous()
                if not values.isfinite().all():
                    raise AdapterError(f"{name} has values beyond {dtype}'s range", hint="Export it in float32.")
                writer.add_tensor(name, values.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            write_file(file, draft.read_bytes())
    except OSError as error:
        raise AdapterError(f"{file} cannot be written: {error.strerror or error}") from error
    return alpha


def _common_alpha(sites: Iterable[TargetModule]) -> float:
    """Return the alpha of most modules; the others' B is scaled to make up the difference."""
    ((alpha, _),) = Counter(site.scaling * site.r for site in sites).most_common(1)
    return alpha if torch.tensor(alpha, dtype=torch.float32) else 1.0  # llama.cpp reads an alpha of 0 as no scaling


def _tensors(
    adapter: Adapter, weights: Mapping[str, str], base: Architecture, alpha: float
) -> Iterator[tuple[str, Tensor]]:
    for path, name in weights.items():
        site = adapter.sites[path]
        a, b = (tensor.detach().cpu().double() for tensor in adapter.pair(path))
        b = base.reorder(name, b * (site.scaling * site.r / alpha))
        # An embedding's A is read by rows, one per token: see build_inp_embd in llama.cpp's src/llama-graph.cpp.
        yield f"{name}.lora_a", a.T if site.kind == "embedding" else a
        yield f"{name}.lora_b", b


def _weights(sites: Mapping[str, TargetModule], base: Architecture) -> dict[str, str]:
    """Return llama.cpp's name of the weight of each module."""
    table = names(base.name, base.blocks)
    weights: dict[str, str] = {}
    problems: list[str] = []
    for path, site in sites.items():
        name = table.get_name(f"{text_path(path)}.weight", try_suffixes=(".weight",))
        problem = _why_not(name, site, base)
        if name is None or problem:
            problems.append(f"{path} {problem}")
        else:
            weights[path] = name
    if problems:
        raise UnsupportedError(
            "llama.cpp cannot take this adapter on this base",
            problems,
            hint="Give the base it was trained on, train it without these modules, or merge it: `loradeck merge`.",
        )
    return weights


def _why_not(name: str | None, site: TargetModule, base: Architecture) -> str | None:
    if site.kind == "conv":
        return "is a convolution"
    if name is None or (name not in base.shapes and name != HEAD):
        return f"is not a weight of this {base.name} base"
    if name not in base.shapes or (name == EMBEDDING and HEAD not in base.shapes):
        return "shares its weight: llama.cpp would adapt both the embedding and the head"
    shape = (site.b_shape[0], site.a_shape[1])
    shape = shape[::-1] if site.kind == "embedding" else shape
    if shape != base.shapes[name]:
        return f"is {shape} in the adapter and {base.shapes[name]} in the base"
    return None
