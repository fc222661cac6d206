"""Adapters from one program's format to another's.

    in    PEFT's folders, with safetensors or a pickle · mlx-lm's folders · LoRA files of llama.cpp
    out   PEFT's folders, also as vLLM takes them · mlx-lm's folders · LoRA files of llama.cpp

An adapter whose initialisation changed its base (PiSSA, OLoRA, …) becomes a plain LoRA on the way.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from loradeck.base.load import Base
from loradeck.errors import AdapterError, BaseModelError, ConfigError, UnsupportedError
from loradeck.gguf import adapter as gguf
from loradeck.gguf.architecture import read_architecture
from loradeck.llamacpp import check_installed
from loradeck.lora import compatibility, foreign, hub, initial, mlx, torch_file, vocabulary
from loradeck.lora.adapter import DTYPES, Adapter, raw
from loradeck.lora.combine import lower_rank
from loradeck.lora.folder import TENSORS
from loradeck.lora.manifest import AdapterFiles, read_folder
from loradeck.lora.safetensors_io import encode
from loradeck.lora.uniform import for_vllm

Format: TypeAlias = Literal["peft", "mlx", "gguf", "vllm"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written: the adapter as the file has it, its alpha, and the error of lowering the rank.

    `error` is ‖D - BA‖ / ‖D‖ (Frobenius) over all modules together, `errors` that of each; 0 and empty if no rank was
    lowered.
    """

    output: Path
    adapter: Adapter
    alpha: float
    error: float = 0.0
    errors: Mapping[str, float] = field(default_factory=dict)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: Format = "peft",
    base: str | Path | Base | None = None,
    rank: int | None = None,
    initial: str | Path | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> Conversion:
    """Convert an adapter to another program's format, atomically.

    Args:
        source: A folder of PEFT or mlx-lm, or a file: .safetensors, .bin or .gguf; or a hub id of a PEFT adapter.
            Pickles run no code.
        output: A new folder; for gguf a new file.
        to: peft; vllm is PEFT's folder with one rank and one scaling for all modules; mlx is mlx-lm's folder; gguf is
            llama.cpp's file.
        base: Its base, where the conversion needs it: from and to gguf; to undo PiSSA and OLoRA; if the adapter has
            copies of the base's weights; from and to mlx if it adapts the embedding or the head. By default the one
            that the adapter names.
        rank: Lower higher ranks to this one, by SVD.
        initial: The adapter's folder as it was saved before training, for initialisations that changed the base.
        dtype: The dtype of a gguf file.

    Raises:
        ConfigError: an invalid argument, `output` exists, or the base is needed and not known.
        UnsupportedError: something of the adapter cannot be in that format; nothing was written.
        AdapterError: with every problem found in the adapter; nothing was written.
        BaseModelError: the base cannot be loaded.
    """
    source, output = hub.local(source), Path(output)
    if to not in FORMATS:
        raise ConfigError(f"unknown format {to!r}", hint=f"Use one of {', '.join(FORMATS)}.")
    if output.exists() and (to == "gguf" or not output.is_dir() or any(output.iterdir())):
        what = "exists" if to == "gguf" else "exists and is not empty"
        raise ConfigError(f"{output} {what}", hint="Give a new one; nothing was written.")
    if to == "gguf":
        check_installed("conversion to gguf")
    try:
        reading = _Reading(source, base)
        _check_saved(reading, to, rank)
        adapter = _plain(reading, Path(initial) if initial is not None else None)
        done = Conversion(output, adapter, 0.0)
        if rank is not None:
            lowered = lower_rank(adapter, rank)
            done = Conversion(output, lowered.adapter, 0.0, lowered.error, lowered.errors)
        return _write(done, reading, to, dtype)
    except BaseModelError as error:
        if base is not None:
            raise
        raise BaseModelError(
            f"the base that {source} names cannot be used: {error.message}",
            error.problems,
            hint=error.hint,
            python="Or pass another as base=.",
            cli="Or give another with --base.",
        ) from error


class _Reading:
    """An adapter that is read, and its base, which is loaded where it is needed.

    Attributes:
        adapter: as its files have it.
    """

    def __init__(self, source: Path, base: str | Path | Base | None) -> None:
        self.source = source
        self._given = base
        self._named: str | None = None
        self._files: AdapterFiles | None = None
        self.adapter = self._read()
        if base is not None:
            self.adapter.origin = replace(self.adapter.origin, base_model=self.base_name(""))

    def base_name(self, why: str) -> str:
        """Return what the base is loaded by.

        Raises:
            ConfigError: it is not known; the message says what it is needed for.
        """
        name = self._given.source if isinstance(self._given, Base) else self._given or self._named
        if name is None:
            raise ConfigError(
                f"{self.source} does not name its base, which is needed {why}",
                python="Pass base=.",
                cli="Give it with --base.",
            )
        return str(name)

    def model(self, why: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Load the base's model, on the CPU."""
        name = self.base_name(why)
        base = self._given if isinstance(self._given, Base) else Base.load(name, dtype=dtype, device="cpu")
        return base.model

    def fitting_model(self, why: str) -> nn.Module:
        """Load the base's model, plain.

        Raises:
            UnsupportedError: it is quantised.
            AdapterError: the adapter does not fit it.
        """
        model = self.model(why)
        if kind := vars(model).get("base_quantisation"):
            raise UnsupportedError(f"the base is in {kind}", hint="Give it in float32, bfloat16 or float16.")
        compatibility.layer_kinds(model, {}, self.adapter.sites, str(self.source))
        if self._files:
            compatibility.check_base(model, self._files, any_base=False)
        return model

    def is_tied(self) -> bool:
        """Return whether the base's head and embedding are one weight."""
        model: Any = self.model("to know whether its head and its embedding are one weight")
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        return head is not None and head.weight is embedding.weight

    def _read(self) -> Adapter:
        path = self.source
        file = path if path.is_file() else None
        try:
            form = foreign.form_of(path)
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error.strerror}") from error
        if form == "gguf":
            check_installed("conversion from gguf")
            why = "for the names and the order of its weights"
            return gguf.read(path, read_architecture(self.base_name(why)))
        folder = file.parent if file else path
        if form == "mlx":
            adapter = mlx.read(folder, tensors=file)
            self._named = adapter.origin.base_model
            return mlx.with_tied_head(adapter) if mlx.touches_vocabulary(adapter) and self.is_tied() else adapter
        if form == "pickle":
            with TemporaryDirectory() as scratch:
                tensors = Path(scratch) / TENSORS
                table = torch_file.read(file or folder / foreign.PICKLE)
                tensors.write_bytes(encode((raw(key, tensor) for key, tensor in table.items()), {"format": "pt"}))
                return self._of_peft(folder, tensors)
        return self._of_peft(folder, file)

    def _of_peft(self, folder: Path, tensors: Path | None) -> Adapter:
        files = self._files = read_folder(folder, tensors=tensors, changed_base=True)
        self._named = files.origin.base_model
        if not files.copies:
            return Adapter.from_files(files)
        _, copy = files.entries[files.copies[0]]
        model = self.model("to compare the copies of its weights", dtype=DTYPES[copy.dtype])
        files = vocabulary.fitted(
            vocabulary.modules(model), files.respelled(compatibility.respelling(model, {}, files))
        )
        adapter = Adapter.from_files(files, check_copy=partial(compatibility.why_not_a_copy, model))
        adapter.base_modules = {path: model.get_submodule(path) for path in adapter.added}
        return adapter


def _check_saved(reading: _Reading, to: Format, rank: int | None) -> None:
    """Refuse an adapter that replaces modules of the base, or adds rows to them, where these would be lost."""
    saved = ", ".join(reading.adapter.saved)
    if saved and to != "peft":
        what = f"{reading.source} replaces {saved}, which {to} has no place for"
        raise UnsupportedError(what, hint="Merge it into its base, and convert that model.")
    if saved and rank is not None:
        raise UnsupportedError(f"{reading.source} replaces {saved}, so its rank cannot be lowered")
    if reading.adapter.added and to != "peft":
        what = f"{reading.source} has tokens that its base has not, which {to} has no place for"
        raise UnsupportedError(what, hint="Merge it into its base, and convert that model.")
    if reading.adapter.added and rank is not None:
        raise UnsupportedError(f"{reading.source} has tokens that its base has not, so its rank cannot be lowered")


def _plain(reading: _Reading, folder: Path | None) -> Adapter:
    """Return the adapter as a change of the base's own weights."""
    adapter = reading.adapter
    name = initial.changed_base(adapter.origin.written)
    if name is None and folder is None:
        return adapter
    if name is not None:
        initial.check(name, given=folder is not None)
    if folder is not None:
        return initial.subtract(adapter, Adapter.from_files(read_folder(folder, changed_base=True)))
    assert name is not None
    model = reading.fitting_model(f"to compute what {name} began with")
    return initial.subtract(adapter, initial.first_values(adapter, name, model))


def _write(done: Conversion, reading: _Reading, to: Format, dtype: Literal["float32", "float16"]) -> Conversion:
    adapter, output = done.adapter, done.output
    if to == "gguf":
        architecture = read_architecture(reading.base_name("for the names and the order of its weights"))
        return replace(done, alpha=gguf.export(adapter, architecture, output, dtype=dtype))
    if to == "mlx":
        tied = mlx.touches_vocabulary(adapter) and reading.is_tied()
        adapter = mlx.write(adapter, output, tied=tied)
    elif to == "vllm":
        adapter = for_vllm(adapter, "this adapter")
        adapter.save(output)
    else:
        adapter.save(output)
    return replace(done, adapter=adapter, alpha=adapter.config.lora_alpha)
