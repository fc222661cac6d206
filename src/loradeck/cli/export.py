"""`loradeck export`: an adapter for other programs. Knows files; lora/gguf.py knows the format."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from loradeck.cli.display.text import shown, size
from loradeck.errors import ConfigError


def export(
    adapter: Path,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    to: Literal["gguf"] = "gguf",
    base: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Write an adapter as a file of another program: gguf is llama.cpp's.

    The file goes onto any GGUF file of the adapter's base, however quantised:
    `llama-server -m BASE.gguf --lora FILE`.

    Args:
        adapter: An adapter's folder.
        output: A new file.
        to: The format.
        base: A .gguf file, a folder, a hub id, or smollm2-135m; by default the base
            that the adapter names. Its weights are not read.
        dtype: The adapter's numbers in the file.
    """
    if find_spec("gguf") is None:
        raise ConfigError(f"export to {to} needs the package gguf", hint="Run pip install 'loradeck[gguf]'.")
    if output.exists():
        raise ConfigError(f"{output} exists", hint="Name a new file; nothing was written.")

    from loradeck.cli import architecture
    from loradeck.lora import gguf
    from loradeck.lora.adapter import Adapter

    loaded = Adapter.load(adapter)
    source = base or loaded.origin.base_model
    if source is None:
        raise ConfigError(f"{adapter} does not say which base it is for", hint="Give it with --base.")
    alpha = gguf.export(loaded, architecture.architecture(source), output, dtype=dtype)
    written = size(output.stat().st_size)
    print(shown(f"{output}: {written}, {len(loaded.sites)} modules, alpha {alpha:g}, {dtype}"))
    print(shown(f"try: llama-cli -m BASE.gguf --lora {output}"))
