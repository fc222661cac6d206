"""`loradeck export`: an adapter in another program's format (lora/gguf.py writes it)."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from loradeck.cli.display.text import format_size, printable
from loradeck.cli.output import check_writable
from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from loradeck.lora.adapter import Adapter
    from loradeck.lora.manifest import AdapterFiles


def export(
    adapter: Path,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    to: Literal["gguf"] = "gguf",
    base: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Write an adapter in another program's format.

    The file works with any GGUF file of the adapter's base, however quantised:
    `llama-server -m BASE.gguf --lora FILE`.

    Args:
        adapter: An adapter's folder.
        output: A new file.
        to: The format; gguf is llama.cpp's.
        base: A folder, a hub id, a .gguf file, or smollm2-135m; by default the one
            that the adapter names. Its weights are read only if the adapter has
            copies of them, as PEFT saves for the head and the embedding.
        dtype: The dtype of the file's tensors.
    """
    if find_spec("gguf") is None:
        raise ConfigError(f"export to {to} needs the package gguf", hint="Run pip install 'loradeck[gguf]'.")
    if output.exists():
        raise ConfigError(f"{output} exists", hint="Give a new file; nothing was written.")
    check_writable(output)

    from loradeck.cli import architecture
    from loradeck.cli.adapter_folder import read_adapter
    from loradeck.lora import gguf

    files = read_adapter(adapter)
    source = base or files.origin.base_model
    if source is None:
        raise ConfigError(f"{adapter} does not name its base", hint="Give it with --base.")
    shapes = architecture.read_architecture(source)
    loaded = _load(files, source)
    alpha = gguf.export(loaded, shapes, output, dtype=dtype)
    file_size = format_size(output.stat().st_size)
    print(printable(f"{output}: {file_size}, {len(loaded.sites)} modules, alpha {alpha:g}, {dtype}"))
    print(printable(f"try: llama-cli -m BASE.gguf --lora {output}"))


def _load(files: "AdapterFiles", source: str) -> "Adapter":
    """Read the adapter; copies of the base's weights are compared with the base in their own dtype."""
    from functools import partial

    from loradeck.base.load import Base
    from loradeck.lora.adapter import DTYPES, Adapter
    from loradeck.lora.compatibility import why_not_a_copy

    if not files.copies:
        return Adapter.from_files(files)
    _, copy = files.entries[files.copies[0]]
    base = Base.load(source, dtype=DTYPES[copy.dtype], device="cpu")
    return Adapter.from_files(files, check_copy=partial(why_not_a_copy, base.model))
