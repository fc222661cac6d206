"""A GGUF file, or the parts of one: its settings, and where its tensors lie. Files are untrusted.

The format is ggml's docs/gguf.md. Every size is checked before anything is read. Tensors are read rather than mapped:
a mapped file that another program cuts short would end the process.
"""

import hashlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from loradeck.errors import BaseModelError

HINT = "Copy the file again; it must be a complete GGUF file of a decoder-only model."
VERSIONS = (2, 3)
MOST = 1 << 16  # settings, and tensors, of a part
LONGEST = 1 << 24  # bytes of a text, and texts of an array
DIMENSIONS = 4  # of a tensor, in ggml
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.DOTALL)  # the stem of a part's name, as llama-gguf-split writes it


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a file: its shape as torch has it, (out, in), and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    type: Any
    """A gguf.GGMLQuantizationType."""
    inputs: int
    """Values of a block, which follow one another in a row."""
    bytes: int
    """Bytes of a block."""
    part: int
    offset: int

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.inputs * self.bytes

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape[:-1]) * self.row

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.offset + self.size


class GgufFile:
    """An open GGUF file; a context manager, which closes it.

    Attributes:
        path: The file, or the first part.
        settings: Its metadata by key: numbers, texts, short arrays of numbers. Other arrays are None.
        tensors: Its tensors by name, those of all parts.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Raises:
            BaseModelError: it is no GGUF file, is damaged, or parts are missing.
        """
        self.path = path
        self._parts: list[_Part] = []
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._open(path)
        except BaseModelError:
            self.close()
            raise
        except (OSError, ValueError) as error:
            self.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise BaseModelError(f"cannot read {path}: {reason}", hint=HINT) from error

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; everything read stays valid."""
        for part in self._parts:
            part.file.close()

    @property
    def settings(self) -> dict[str, Any]:
        return self._parts[0].settings

    @cached_property
    def digest(self) -> str:
        """The sha256, in hex, of the headers and sizes: of everything but the tensors' values."""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(part.read(0, part.data) + struct.pack("<Q", part.size))
        return digest.hexdigest()

    @property
    def metadata(self) -> bytes:
        """A GGUF file with the same metadata, and without tensors."""
        first = self._parts[0]
        content = first.read(0, first.table)
        return content[:8] + bytes(8) + content[16:]

    def memory(self) -> Tensor:
        """Return memory for any tensor of the file, uint8."""
        return torch.empty(max(tensor.size for tensor in self.tensors.values()), dtype=torch.uint8)

    def read(self, tensor: GgufTensor, into: Tensor) -> Tensor:
        """Return a tensor's bytes, uint8 (size,), in the memory of `into`.

        Raises:
            BaseModelError: the file has become shorter.
        """
        data = into[: tensor.size]
        part = self._parts[tensor.part]
        part.file.seek(tensor.offset)
        if part.file.readinto(data.numpy().data) != tensor.size:
            self._raise_changed(part)
        return data

    def values(self, tensor: GgufTensor) -> Tensor:
        """Return a tensor's values, de-quantised, in float32 and in the file's order."""
        data = self.read(tensor, torch.empty(tensor.size, dtype=torch.uint8))
        return decode(tensor.type, data.view(-1, tensor.row)).view(tensor.shape)

    def check_unchanged(self) -> None:
        """Refuse a file that another program has written to since it was opened.

        Raises:
            BaseModelError: its size or its time differs.
        """
        for part in self._parts:
            if _stamp(part.file) != part.stamp:
                self._raise_changed(part)

    def _raise_changed(self, part: "_Part") -> None:
        raise BaseModelError(
            f"{part.path} changed while it was read", hint="Load it again once nothing writes to it any more."
        )

    def _open(self, path: Path) -> None:
        self._parts = [_Part(path)]
        count = self.settings.get("split.count", 1)
        if isinstance(count, int) and count > 1:
            paths = parts(path)
            if len(paths) != count:
                raise ValueError(f"it is one of {count} parts: name it ...-0000N-of-{count:05}.gguf, as it was")
            if missing := [each.name for each in paths if not each.is_file()]:
                raise BaseModelError(
                    f"{path} is one of {count} parts, and others are missing",
                    missing,
                    hint="Put all parts in one folder.",
                )
            self.close()
            self._parts = []
            for each in paths:
                self._parts.append(_Part(each))
            self.path = paths[0]
        problems: list[str] = []
        for number, part in enumerate(self._parts):
            place = part.settings.get("split.no", number)  # from 0
            if place != number:
                problems.append(f"the split.no of {part.path.name} is {place!r:.80}, not {number}")
            for tensor in part.tensors(number, problems):
                if tensor.name in self.tensors:
                    problems.append(f"{tensor.name} is there twice")
                self.tensors[tensor.name] = tensor
        if problems:
            raise BaseModelError(f"{path} is damaged", problems, hint=HINT)
        if not self.tensors:
            raise ValueError("it has no tensors")


class _Part:
    """One file: its header, read, and where its data begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")
        try:
            self.stamp = _stamp(self.file)
            self.size = self.stamp[0]
            self._read_header()
        except BaseException:
            self.file.close()
            raise

    def read(self, start: int, end: int) -> bytes:
        """Return some of the file's bytes."""
        self.file.seek(start)
        return self.file.read(end - start)

    def tensors(self, number: int, problems: list[str]) -> Iterator[GgufTensor]:
        """Yield the tensors of this part, whose number is given; add what is wrong with others to the problems."""
        import gguf

        tail: list[GgufTensor] = []
        for name, shape, code, offset in self._table:
            try:
                kind = gguf.GGMLQuantizationType(code)
                inputs, size = gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                problems.append(f"{name} has the unknown type {code}")
                continue
            tensor = GgufTensor(name, shape, kind, inputs, size, number, self.data + offset)
            if not shape or min(shape) < 1 or shape[-1] % inputs:
                problems.append(f"{name} is {shape}, in blocks of {inputs}")
            elif tensor.end > self.size:
                tail.append(tensor)
            else:
                yield tensor
        if tail:
            last = max(tail, key=lambda tensor: tensor.end)
            problems.append(
                f"{self.path.name} has {self.size} bytes, and {len(tail)} tensors end after them, the last at byte "
                f"{last.end}: {last.name}"
            )

    def _read_header(self) -> None:
        if self._take(4) != b"GGUF":
            raise ValueError("it is not a GGUF file")
        version, tensors, settings = self._unpack("<IQQ")
        if version not in VERSIONS:
            big = int.from_bytes(struct.pack("<I", version), "big") in VERSIONS
            raise ValueError("it is big-endian" if big else f"GGUF version {version} is not supported")
        if max(tensors, settings) > MOST:
            raise ValueError(f"it claims {tensors} tensors and {settings} settings; at most {MOST} are read")
        self.settings: dict[str, Any] = {}
        for _ in range(settings):
            key = self._text()
            if key in self.settings:
                raise ValueError(f"{key!r:.80} is there twice")
            (kind,) = self._unpack("<I")
            self.settings[key] = self._value(kind, key)
        self.table = self.file.tell()
        self._table: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(tensors):
            name = self._text()
            (dimensions,) = self._unpack("<I")
            if dimensions > DIMENSIONS:
                raise ValueError(f"{name!r:.80} has {dimensions} dimensions; at most {DIMENSIONS} are known")
            *shape, kind, offset = self._unpack(f"<{dimensions}QIQ")
            self._table.append((name, tuple(reversed(shape)), kind, offset))  # ggml counts from the innermost
        alignment = self.settings.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MOST or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r:.80}, not a power of two")
        self.data = -(-self.file.tell() // alignment) * alignment
        if self._table and self.data > self.size:
            raise ValueError("it ends within its header")

    def _value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self._unpack("<" + SCALARS[kind])[0]
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise ValueError(f"{key!r:.80} has the unknown type {kind}")
        kind, count = self._unpack("<IQ")
        if kind == STRING:
            return self._skip_texts(count)
        if kind not in SCALARS:
            raise ValueError(f"{key!r:.80} is an array of the unknown type {kind}")
        size = struct.calcsize("<" + SCALARS[kind])
        if count > MOST:
            self._skip(count * size)
            return None
        return [*self._unpack(f"<{count}{SCALARS[kind]}")]

    def _text(self) -> str:
        (length,) = self._unpack("<Q")
        if length > LONGEST:
            raise ValueError(f"a text of {length} bytes in its header; at most {LONGEST} are read")
        return self._take(length).decode()

    def _skip_texts(self, count: int) -> None:
        """Skip an array of texts. A vocabulary has some hundred thousand, so this is a tight loop."""
        if count > LONGEST:
            raise ValueError(f"an array of {count} texts in its header; at most {LONGEST} are read")
        read, at, end = self.file.read, self.file.tell(), self.size
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            at += 8 + length
            if at > end:
                raise ValueError("it ends within its header")
            read(length)

    def _skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("it ends within its header")
        self.file.seek(count, os.SEEK_CUR)

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _take(self, count: int) -> bytes:
        content = self.file.read(count)
        if len(content) < count:
            raise ValueError("it ends within its header")
        return content


def parts(path: Path) -> list[Path]:
    """Return the paths of all parts of a file whose name is that of a part; of another file, its own."""
    name = PART.fullmatch(path.stem)
    if not name:
        return [path]
    return [path.with_name(f"{name[1]}-{at:05}-of-{name[3]}{path.suffix}") for at in range(1, int(name[3]) + 1)]


def base_name(path: Path) -> str:
    """Return the name of a file without its extension, and without the number of a part."""
    name = PART.fullmatch(path.stem)
    return name[1] if name else path.stem


def _stamp(file: BinaryIO) -> tuple[int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def decode(kind: Any, data: Tensor) -> Tensor:
    """Return the values of blocks of a gguf.GGMLQuantizationType: uint8 (rows, bytes) -> float32 (rows, values)."""
    import gguf

    values = torch.from_numpy(gguf.dequantize(data.numpy(), kind))
    return values.clone() if kind == gguf.GGMLQuantizationType.F32 else values  # these are the bytes themselves
