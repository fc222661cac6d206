"""An adapter as a LoRA file of llama.cpp (GGUF): written and read.

The format is defined by its reader, llama.cpp's src/llama-adapter.cpp, and by convert_lora_to_gguf.py there. The file
has one alpha; the scaling of each pair is alpha / r, with the pair's own r. Names and the order of rows are the base's.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from loradeck.base.gguf_file import GgufFile
from loradeck.disk import write_file
from loradeck.errors import AdapterError, BaseModelError, UnsupportedError
from loradeck.llamacpp import EMBEDDING, HEAD, Architecture, names, text_path
from loradeck.lora.adapter import Adapter
from loradeck.lora.config import MAX_ALPHA
from loradeck.lora.manifest import TargetModule, config_of

ALORA = "adapter.alora.invocation_tokens"
ENDS = ".lora_a", ".lora_b"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")  # the names where q, k and v are one weight


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


def read(file: Path, base: Architecture) -> Adapter:
    """Read an adapter from a file of llama.cpp, in float32, with the names that transformers has for this base.

    Raises:
        UnsupportedError: it is no LoRA, or one that is active only after certain tokens.
        AdapterError: it cannot be read or does not fit the base, with every problem found.
    """
    try:
        with GgufFile(file) as opened:
            alpha = _alpha_of(opened, base)
            tensors = {name: opened.values(tensor) for name, tensor in opened.tensors.items()}
    except BaseModelError as error:
        raise AdapterError(error.message, error.problems, hint="Copy or download the file again.") from error
    paths = _paths(base)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    sites: dict[str, TargetModule] = {}
    problems = [f"{name} is neither a lora_a nor a lora_b" for name in tensors if not name.endswith(ENDS)]
    for name in dict.fromkeys(name.removesuffix(end) for name in tensors for end in ENDS if name.endswith(end)):
        a, b = (tensors.get(name + end) for end in ENDS)
        path = paths.get(name)
        if path is None or a is None or b is None or a.dim() != 2 or b.dim() != 2:
            problems.append(f"{name} is not a weight of this base" if path is None else f"{name} lacks an A or a B")
            continue
        kind = "embedding" if name == EMBEDDING else "linear"
        a = a.T.contiguous() if kind == "embedding" else a
        r, shape = b.shape[1], (b.shape[0], a.shape[1])
        if len(a) != r or (shape[::-1] if kind == "embedding" else shape) != base.shapes[name]:
            problems.append(f"{name} has A {tuple(a.shape)} and B {tuple(b.shape)}; it is {base.shapes[name]}")
            continue
        order = base.file_rows(name, len(b))
        pairs[path] = a, b if order is None else b[order]
        sites[path] = TargetModule(kind, r, alpha / r if alpha else 1.0, tuple(a.shape), tuple(b.shape))
    if problems:
        raise AdapterError(f"{file} does not fit this base", problems, hint="Give the base it was trained on.")
    return Adapter.with_sites(config_of(sites), sites, pairs)


def _alpha_of(file: GgufFile, base: Architecture) -> float:
    settings = file.settings
    kind, name = (settings.get(key) for key in ("adapter.type", "general.architecture"))
    if settings.get("general.type") != "adapter" or kind != "lora":
        raise UnsupportedError(f"{file.path} is not a LoRA file of llama.cpp", hint="`loradeck export` writes one.")
    if ALORA in settings:
        raise UnsupportedError(f"{file.path} is an activated LoRA, active only after certain tokens")
    if name != base.name:
        raise AdapterError(f"{file.path} is for {name!r:.40}; this base is {base.name}", hint="Give its own base.")
    alpha = settings.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not abs(alpha) <= MAX_ALPHA:
        raise AdapterError(f"{file.path} has an alpha of {alpha!r:.40}", hint="Copy or download the file again.")
    return alpha


def _paths(base: Architecture) -> dict[str, str]:
    """Return the module of each weight that an adapter can have, by llama.cpp's name of the weight."""
    table = names(base.name, base.blocks)
    attention, mlp = FUSED if "blk.0.attn_qkv.weight" in base.shapes else (ATTENTION, MLP)
    layers = [*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}" for name in mlp)]
    modules = [f"model.layers.{block}.{name}" for block in range(base.blocks) for name in layers]
    weights = {table.get_name(path, try_suffixes=("",)): path for path in modules}
    return {f"{name}.weight": path for name, path in weights.items() if f"{name}.weight" in base.shapes} | {
        name: path for name, path in ((EMBEDDING, "model.embed_tokens"), (HEAD, "lm_head")) if name in base.shapes
    }


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
