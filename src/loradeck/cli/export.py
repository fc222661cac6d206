"""`loradeck export`: an adapter, a base or a merged model in another program's format."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from loradeck.cli import blend
from loradeck.cli.adapter_folder import close_adapters
from loradeck.cli.convert import convert, print_conversion
from loradeck.cli.display.text import format_size, printable
from loradeck.cli.output import check_writable
from loradeck.errors import BaseModelError, ConfigError
from loradeck.lora import hub

ADAPTER_DTYPES: dict[str, Literal["float32", "float16"]] = {"f32": "float32", "f16": "float16"}
Quant = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"]


def export(
    source: str,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    adapter: Annotated[str | None, Parameter(alias="-a")] = None,
    to: Literal["gguf", "vllm"] = "gguf",
    quant: Quant | None = None,
    base: str | None = None,
) -> None:
    """Write a base, a base with an adapter merged into it, or an adapter for llama.cpp; or an adapter for vLLM.

    `loradeck export BASE --adapter ADAPTER -o FILE` writes a model that needs
    nothing else: `llama-cli -m FILE`. `loradeck export ADAPTER -o FILE` writes
    the adapter alone, for any GGUF file of its base, however quantised:
    `llama-server -m BASE.gguf --lora FILE`. It is `loradeck convert --to gguf`.

    `loradeck export ADAPTER -o FOLDER --to vllm` writes an adapter as a folder that vLLM
    reads exactly, or says why there is none. It is `loradeck convert --to vllm`.

    Args:
        source: A base (a folder, a hub id, a .gguf file, or smollm2-135m), or an adapter's folder or hub id.
        output: A new file; for vllm a new folder.
        adapter: Merge this into the base: an adapter's folder, or a blend such as
            adapters/poet*0.7+adapters/pirate*0.3.
        to: The format; gguf is llama.cpp's. vllm is PEFT's folder with one rank and one scaling
            for all modules, of an adapter alone.
        quant: The type of the file's weights; by default q8_0 for a model, f32 for an adapter,
            which has f32 or f16. With q5 and q4 the embedding and the head are in q8_0; with
            q4_k, matrices whose rows are no multiple of 256 are in q5_0.
        base: The base of an adapter that is exported alone; by default the one that the
            adapter names. Its weights are read only if the adapter has copies of them, as
            PEFT saves for the head and the embedding.
    """
    from loradeck.llamacpp import check_installed
    from loradeck.lora.manifest import is_adapter

    if to == "vllm":
        _export_for_vllm(source, output, adapter, base, quant)
        return
    if output.exists():
        raise ConfigError(f"{output} exists", hint="Give a new file; nothing was written.")
    check_writable(output)
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"{output} cannot be written: there is no folder {output.parent}", hint="Create it first.")
    check_installed(f"export to {to}")
    if is_adapter(Path(source)) or hub.has_adapter(source):
        if adapter is not None:
            raise ConfigError(
                f"{source} is an adapter, and --adapter is merged into a base",
                hint="Give the base first: loradeck export BASE --adapter ADAPTER.",
            )
        _export_adapter(source, output, base, quant or "f32")
    else:
        if base is not None:
            raise ConfigError(
                f"{source} is not an adapter; --base is for one that is exported alone",
                hint=f"To merge an adapter: loradeck export {base} --adapter ADAPTER.",
            )
        try:
            _export_model(source, output, adapter, quant or "q8_0")
        except BaseModelError as error:
            if adapter is not None or Path(source).exists():
                raise
            words = f"{error.hint} If it is an adapter: {close_adapters(source)}"
            raise BaseModelError(error.message, hint=words) from error


def _export_for_vllm(source: str, output: Path, adapter: str | None, base: str | None, quant: Quant | None) -> None:
    if adapter is not None:
        raise ConfigError(
            "only an adapter alone is exported for vLLM",
            hint=f"vLLM serves what `loradeck merge {source} {adapter} -o FOLDER` writes, or the adapter without "
            f"merging: loradeck export {adapter} -o FOLDER --to vllm.",
        )
    if quant is not None:
        raise ConfigError("an adapter for vLLM keeps the dtype of its tensors", hint="Leave out --quant.")
    convert(source, output=output, to="vllm", base=base)


def _export_adapter(adapter: str, output: Path, base: str | None, quant: Quant) -> None:
    dtype = ADAPTER_DTYPES.get(quant)
    if dtype is None:
        raise ConfigError(
            f"an adapter alone has f32 or f16, not {quant}",
            hint=f"To quantise base and adapter together: loradeck export BASE --adapter {adapter} --quant {quant}.",
        )

    from loradeck import conversion

    done = conversion.convert(adapter, output, to="gguf", base=base, dtype=dtype)
    print_conversion(done, "gguf", quant)


def _export_model(base: str, output: Path, adapter: str | None, quant: Quant) -> None:
    weights = blend.parse(adapter) if adapter is not None else {}
    files = blend.read(weights)

    from loradeck.gguf import model

    opened = model.Model.open(base)
    folders: dict[str, float] = {}
    for name, weight in weights.items():
        folder = str(files[name].folder)
        folders[folder] = folders.get(folder, 0.0) + weight
    merge = model.load_adapters(opened, folders) if folders else model.Merge()
    types = model.export(opened, merge, output, quant)
    merged = f" with {adapter}" if folders else ""
    others = ", ".join(f"{name} for {count}" for name, count in types.items() if name != quant)
    kinds = f"{quant} ({others} of {types.total()} matrices)" if others else quant
    print(printable(f"{output}: {format_size(output.stat().st_size)}, {opened.name}{merged}, {kinds}"))
    print(printable(f"try: llama-cli -m {shlex.quote(str(output))}"))
