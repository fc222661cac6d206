"""Adapters that are no PEFT folder with safetensors: which program's they are, and what makes them one."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loradeck.disk import read_start
from loradeck.errors import UnsupportedError

Form: TypeAlias = Literal["mlx", "gguf", "pickle"]

GGUF, PICKLES = b"GGUF", (b"PK", b"\x80")  # the first bytes of such files; torch.save writes a zip archive
PICKLE = "adapter_model.bin"
MLX_TENSORS = "adapters.safetensors"
MLX_KEYS = frozenset({"fine_tune_type", "lora_layers", "lora_parameters"})  # of an adapter_config.json by mlx-lm
WHAT: Mapping[Form, str] = {
    "mlx": "an adapter of mlx-lm, not of PEFT",
    "gguf": "a GGUF file, not an adapter's folder",
    "pickle": "a pickle, which can run code when opened",
}


def is_mlx(table: Mapping[str, Any]) -> bool:
    """Return whether an adapter_config.json is mlx-lm's."""
    return "peft_type" not in table and not MLX_KEYS.isdisjoint(table)


def form_of(path: Path) -> Form | None:
    """Return the form of an adapter, a folder or a file; None for PEFT's safetensors, and where nothing is.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_file():
        return form_of_file(path)
    if any(path.glob(f"*{MLX_TENSORS}")):  # checkpoints of a run have a number before it
        return "mlx"
    return "pickle" if (path / PICKLE).exists() and not any(path.glob("*.safetensors*")) else None


def form_of_file(path: Path) -> Form | None:
    """Return the form of an adapter's file by its first bytes; None for safetensors of PEFT, and for other files.

    Raises:
        OSError: it cannot be read.
    """
    start, _ = read_start(path, len(GGUF))
    if start == GGUF:
        return "gguf"
    if start.startswith(PICKLES):
        return "pickle"
    return "mlx" if path.name.endswith(MLX_TENSORS) else None


def refused(path: Path) -> UnsupportedError | None:
    """Return the error of a file that is given as an adapter's folder; None if it is no adapter of another form."""
    try:
        form = form_of_file(path)
    except OSError:
        return None
    return refusal(form, path) if form else None


def refusal(form: Form, path: Path) -> UnsupportedError:
    """Return the error of a command that takes PEFT folders only; it names the command that makes one."""
    base = " --base BASE" if form == "gguf" else ""
    return UnsupportedError(
        f"{path} is {WHAT[form]}",
        python=f"Convert it: loradeck.convert({str(path)!r}, NEW).",
        cli=f"Convert it: loradeck convert {shlex.quote(str(path))} -o NEW{base}",
    )
