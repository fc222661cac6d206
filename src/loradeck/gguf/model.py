"""Export a base, or a base with adapters merged into it, as a GGUF file for llama.cpp.

One weight is in memory at a time: it is read from the base's files, merged in float32, brought into llama.cpp's order,
and rounded once, to the file's type.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from loradeck.base.adapter_tokenizer import AdapterTokenizers
from loradeck.base.checkpoint import COMPLETE, Checkpoint
from loradeck.base.fingerprint import fingerprint_of
from loradeck.base.language_model import is_multimodal, language_model
from loradeck.base.load import load_tokenizer, local_folder
from loradeck.base.pretrained import quiet
from loradeck.base.quantiser import ENCODERS, quantise
from loradeck.disk import new_file
from loradeck.errors import AdapterError, BaseModelError, UnsupportedError
from loradeck.gguf import metadata
from loradeck.gguf.architecture import architecture_of
from loradeck.gguf.vocabulary import add_vocabulary
from loradeck.llamacpp import EMBEDDING, FACTORS, GEMMA, HEAD, Architecture, names
from loradeck.lora import compatibility, vocabulary
from loradeck.lora.adapter import Adapter
from loradeck.lora.manifest import read_folder
from loradeck.lora.merge import merged_weight
from loradeck.lora.spelling import PREFIX
from loradeck.ops.layer_kinds import LayerKind

if TYPE_CHECKING:
    import numpy as np

# For these the embedding and the head, which suffer most, are in q8_0.
COARSE = frozenset({"q5_1", "q5_0", "q4_1", "q4_0", "q4_k"})
FALLBACKS = {"q4_k": "q5_0"}  # of a matrix whose rows are no whole blocks, as in llama.cpp; f16 for all others
FILE_TYPES = {"f32": "ALL_F32", "q4_k": "MOSTLY_Q4_K_S"}


@dataclass(frozen=True)
class Model:
    """A base as its files have it: configuration, modules without memory, and weights to read one at a time."""

    source: str
    name: str
    folder: Path
    config: PretrainedConfig
    skeleton: PreTrainedModel
    """On the meta device."""
    architecture: Architecture
    checkpoint: Checkpoint
    """Of a multimodal base only what its language model has, by the names that it has there."""

    @classmethod
    def open(cls, source: str) -> "Model":
        """Open a base; its weights are not read yet.

        Raises:
            BaseModelError: nothing is there, it cannot be read, or weights are missing.
            UnsupportedError: llama.cpp cannot compute it.
        """
        name, folder = local_folder(source)
        try:
            with quiet():
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                part = language_model(source, config, folder) if is_multimodal(config) else None
                config = part.config if part else config
                architecture, skeleton = architecture_of(config, source)
            checkpoint = part.checkpoint if part else Checkpoint(folder, {})
        except (BaseModelError, UnsupportedError):
            raise
        except Exception as error:  # what untrusted files make transformers raise has no common class
            line = str(error).strip().partition("\n")[0] or type(error).__name__
            raise BaseModelError(f"cannot read {source}: {line}") from error
        metadata.check(config, architecture)
        missing = [path for path, _ in skeleton.named_parameters() if path not in checkpoint.files]
        if missing:
            raise BaseModelError(f"{source} lacks weights", missing, hint=COMPLETE)
        if part is not None:
            part.mark(skeleton)
        return cls(source, name, folder, config, skeleton, architecture, checkpoint)

    @cached_property
    def fingerprint(self) -> str:
        """As `Base.fingerprint`."""
        parameters = ((path, self.checkpoint.get(path)) for path in sorted(dict(self.skeleton.named_parameters())))
        return fingerprint_of(type(self.skeleton).__name__, parameters)


@dataclass(frozen=True)
class Merge:
    """Adapters to merge, each at a weight, and the kinds of the modules that they adapt."""

    weighted: Sequence[tuple[Adapter, float]] = ()
    kinds: Mapping[str, LayerKind] = field(default_factory=dict)

    def __call__(self, module: str, weight: Tensor) -> Tensor:
        """Return a module's merged weight, in float32.

        Raises:
            AdapterError: it is not finite.
        """
        pairs = [
            (*adapter.pair(module), factor * adapter.sites[module].scaling)
            for adapter, factor in self.weighted
            if module in adapter.sites
        ]
        total = merged_weight(weight.float(), self.kinds[module], pairs) if pairs else weight.float()
        if not bool(total.isfinite().all()):
            raise AdapterError(f"{module} has values that are NaN or Inf", hint="Check the adapter and its weight.")
        return total


def load_adapters(model: Model, folders: Mapping[str, float]) -> Merge:
    """Load adapters that fit a base, from folders with a weight each.

    Raises:
        UnsupportedError, AdapterError: as `Bank.load`.
    """
    vars(model.skeleton).update(fingerprint=model.fingerprint)
    weighted: list[tuple[Adapter, float]] = []
    kinds: dict[str, LayerKind] = {}
    for folder, weight in folders.items():
        files = read_folder(folder)
        files = files.respelled(compatibility.respelling(model.skeleton, kinds, files))
        files = vocabulary.fitted(vocabulary.modules(model.skeleton), files)
        kinds |= compatibility.layer_kinds(model.skeleton, kinds, files.sites, folder, files.spellings)
        compatibility.check_base(model.skeleton, files, any_base=False)
        compatibility.warn_of_gaps(files, compatibility.lacking(model.skeleton, files))
        if files.saved:
            raise UnsupportedError(
                f"{folder} replaces {', '.join(files.saved)}: such modules are not exported", hint="Use loradeck merge."
            )
        if files.base_rows:
            raise UnsupportedError(
                f"{folder} has tokens that its base has not: they are not exported with it",
                hint="Use loradeck merge, and export the merged model.",
            )
        weighted.append((Adapter.from_files(files, check_copy=partial(_why_not_a_copy, model)), weight))
    return Merge(weighted, kinds)


def export(model: Model, merge: Merge, file: Path, quant: str) -> Counter[str]:
    """Write a base with adapters merged into it as a GGUF file, atomically; return how many matrices have each type.

    Matrices get the type `quant`. If their rows are no multiple of its blocks, they get f16 or, in place of q4_k, q5_0.
    For q5 and q4, the embedding and the head get q8_0. Vectors stay in float32.

    Raises:
        UnsupportedError: llama.cpp has no such tokenizer, or no such weight.
        AdapterError: a merged weight is not finite, or too large for f16.
        BaseModelError: a weight is too large for a quantised type, or the file cannot be written.
    """
    import gguf

    entries = list(_entries(model, merge))
    types = {entry.name: _type(entry, quant) for entry in entries}
    try:
        with new_file(file) as draft, ExitStack() as stack:
            writer = gguf.GGUFWriter(draft, model.architecture.name)
            stack.callback(writer.close)
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(model.name)
            writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(quant)))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            metadata.add_settings(writer, model.config, model.architecture)
            add_vocabulary(writer, _tokenizer(model, merge), _generation(model.folder), model.config.vocab_size)
            for entry in entries:
                shape = gguf.quant_shape_to_byte_shape(entry.shape, types[entry.name])
                writer.add_tensor_info(
                    entry.name, entry.shape, _float32(), math.prod(shape), raw_dtype=types[entry.name]
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                writer.write_tensor_data(_rounded(entry, types[entry.name]))
    except OSError as error:
        raise BaseModelError(f"{file} cannot be written: {error.strerror or error}") from error
    return Counter(types[entry.name].name.lower() for entry in entries if len(entry.shape) > 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file, computed when it is written."""

    name: str
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]


def _entries(model: Model, merge: Merge) -> Iterator[Entry]:
    """Yield the tensors of the file."""
    base = model.architecture
    table = names(base.name, base.blocks)
    parameters = {path: tuple(parameter.shape) for path, parameter in model.skeleton.named_parameters()}
    head = _head(model.skeleton)
    unknown: list[str] = []
    if (factors := metadata.rope_factors(model.config, base)) is not None:
        yield Entry(FACTORS, tuple(factors.shape), lambda: factors)
    for path, shape in parameters.items():
        name = table.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            unknown.append(path)
            continue
        yield Entry(name, shape, partial(_value, model, merge, path, path.rpartition(".")[0], name))
        shared = name == EMBEDDING and f"{head}.weight" not in parameters
        if shared and {path.rpartition(".")[0], head} & merge.kinds.keys():  # an adapter changes one of the two
            yield Entry(HEAD, shape, partial(_value, model, merge, path, str(head), HEAD))
    if unknown:
        raise UnsupportedError(f"llama.cpp's {base.name} has no such weights", unknown)


def _value(model: Model, merge: Merge, path: str, module: str, name: str) -> Tensor:
    """Return a weight as llama.cpp has it, in float32: of the module, from the parameter at a path."""
    base = model.architecture
    weight = model.checkpoint.get(path)
    value = merge(module, weight) if path.endswith(".weight") else weight.float()
    if base.name in GEMMA and name.endswith("norm.weight"):
        value = value + 1
    return base.reorder(name, value).contiguous()


def _head(skeleton: PreTrainedModel) -> str | None:
    """Return the path of the output head."""
    head = skeleton.get_output_embeddings()
    return next((path for path, module in skeleton.named_modules() if module is head), None)


def _type(entry: Entry, quant: str) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if len(entry.shape) == 1:
        return kinds.F32
    if quant in COARSE and entry.name in (EMBEDDING, HEAD):
        quant = "q8_0"
    while entry.shape[-1] % gguf.GGML_QUANT_SIZES[kinds[quant.upper()]][0]:
        quant = FALLBACKS.get(quant, "f16")
    return kinds[quant.upper()]


def _rounded(entry: Entry, kind: Any) -> "np.ndarray[Any, Any]":
    import gguf

    value = entry.compute()
    if kind == gguf.GGMLQuantizationType.F16 and not bool(value.half().isfinite().all()):
        raise AdapterError(f"{entry.name} has values beyond float16's range", hint="Export it as bf16 or f32.")
    if kind.name in ENCODERS:
        return quantise(value, kind.name, entry.name).numpy()
    return gguf.quantize(value.numpy(), kind)


def _file_type(quant: str) -> str:
    return FILE_TYPES.get(quant, f"MOSTLY_{quant.upper()}")


def _float32() -> "np.dtype[Any]":
    import numpy as np

    return np.dtype(np.float32)


def _tokenizer(model: Model, merge: Merge) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the adapters that are merged if they agree on one of their own, else the base's."""
    tokenizers = AdapterTokenizers(load_tokenizer(model.source), model.config)
    return tokenizers.of(adapter.tokenizer_files for adapter, _ in merge.weighted)


def _generation(folder: Path) -> GenerationConfig | None:
    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None


def _why_not_a_copy(model: Model, key: str, tensor: Tensor) -> str | None:
    """As `compatibility.why_not_a_copy`, for weights in files."""
    parameters = dict(model.skeleton.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in model.skeleton.named_parameters()}
    copied = parameters.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    path = names[id(copied)] if copied is not None else ""  # of a tied head, the embedding's
    if path not in model.checkpoint.files:
        return "belongs to no weight of this base"
    weight = model.checkpoint.get(path)
    return compatibility.why_other_shape(weight, tensor) or compatibility.why_other_values(weight, tensor)
