"""What lies at a path where an adapter's folder should be, said in one line."""

import re
from pathlib import Path

from loradeck.errors import AdapterError

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
LFS = b"version https://git-lfs.github.com/spec/"
SHOWN = 3  # names of folders in an error


def no_adapter(path: Path) -> AdapterError:
    """Return the error for a path without an adapter_config.json: what it is instead, and what to give."""
    if path.is_file():
        return AdapterError(f"{path} is a file, not an adapter's folder", hint=f"Give its folder: {path.parent}")
    names = sorted((inner.parent.name for inner in path.glob(f"[!.]*/{CONFIG}")), key=_numbers_by_value)
    if names:
        shown = f"{len(names)}, the last of them " * (len(names) > SHOWN) + ", ".join(names[-SHOWN:])
        return AdapterError(
            f"{path} holds no {CONFIG} itself, but folders with adapters: {shown}",
            hint=f"Give one of them, such as {path / names[-1]}",
        )
    what = f"holds no {CONFIG}" if path.is_dir() else "is not a folder"
    hint = f"An adapter's folder contains {CONFIG} and {TENSORS}, as PEFT writes them too."
    return AdapterError(f"{path} {what}", hint=hint)


def check_lfs(path: Path, content: bytes) -> None:
    """Raise an error if the start of a file is that of a Git LFS pointer, which a clone without Git LFS holds instead.

    Raises:
        AdapterError: it is.
    """
    if content.startswith(LFS):
        raise AdapterError(
            f"{path} is a Git LFS pointer: the file itself was not downloaded",
            hint=f"Run `git lfs install` and `git lfs pull` in {path.parent}, or download the folder again.",
        )


def _numbers_by_value(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
