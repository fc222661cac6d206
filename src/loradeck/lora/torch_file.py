"""Tensors of a file that torch.save wrote, which is a pickle in a zip archive; no code of the file runs.

torch.load's weights_only allows tensors and plain containers alone. What it does not bound is memory: entries that
are compressed, or share their bytes, and tensors whose strides repeat few values. These are refused.
"""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from loradeck.errors import AdapterError, shorten
from loradeck.lora.adapter import DTYPE_NAMES

MAX_PICKLE = 16 << 20  # bytes, of names and shapes
HINT = "Load it in PEFT, if you trust it, and save it as safetensors."


def read(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors by name.

    Raises:
        AdapterError: it is no such file, holds something else, or would take more memory than its size.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries overlap")
        if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE for entry in entries):
            raise ValueError(f"its table of tensors is longer than {MAX_PICKLE} bytes")
        table = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what untrusted files make torch raise has no common class
        line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise AdapterError(f"{path} is not a file of tensors by torch.save: {line[:200]}", hint=HINT) from error
    problems = _problems(table, size)
    if problems:
        raise AdapterError(f"{path} holds more than an adapter's tensors", problems, hint=HINT)
    return table


def _problems(table: object, size: int) -> list[str]:
    if not isinstance(table, dict):
        return [f"it is a {type(table).__name__}, not a table of tensors"]
    problems = []
    total = 0
    for key, value in table.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            problems.append(f"{shorten(key, 120)} is a {type(value).__name__}")
        elif value.layout != torch.strided or value.dtype not in DTYPE_NAMES or value.device.type != "cpu":
            problems.append(f"{shorten(key, 120)} is a tensor of {value.dtype}, {value.layout}, on {value.device}")
        else:
            total += value.numel() * value.element_size()
    if total > size:
        problems.append(f"its tensors take {total} bytes, the file has {size}")
    return problems
