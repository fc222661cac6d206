"""Quantised matrices in tiles, as the step reads them (quantised.h), made from the blocks of GGUF files.

Their values are llama.cpp's, to the bit. The blocks of other tools' weights are ours: a scale, then codes as in Q4_0
and Q8_0. U4 has a scale in float16 and a byte for the code of zero, NF4 (bitsandbytes') and I8 a scale in float32.

O outputs   I inputs
"""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loradeck.native.blocks import FORMATS, INPUTS, OUTPUTS, padded
from loradeck.native.library import CLayout, CMatrix, CPlain, any_library

PART = 1 << 20  # numbers decoded at a time for rows
NO_MEMORY = "out of memory for quantised weights"


class Kind(NamedTuple):
    """How weights are quantised: a block of so many inputs takes so many bytes of a file."""

    name: str
    """As in `gguf.GGMLQuantizationType`, or one of those below that no GGUF file has."""
    number: int
    inputs: int
    bytes: int

    @property
    def takes_int8(self) -> bool:
        """Whether it can be multiplied with int8 activations: its codes stand for whole numbers of 8 bits."""
        return self.name != "NF4"


KINDS: Mapping[str, Kind] = {
    name: Kind(name, number, inputs, size)
    for number, (name, inputs, size) in enumerate(
        (
            ("Q8_0", 32, 34), ("Q4_0", 32, 18), ("Q4_1", 32, 20), ("Q5_0", 32, 22), ("Q5_1", 32, 24),
            ("IQ4_NL", 32, 18), ("MXFP4", 32, 17), ("Q2_K", 256, 84), ("Q3_K", 256, 110), ("Q4_K", 256, 144),
            ("Q5_K", 256, 176), ("Q6_K", 256, 210), ("IQ4_XS", 256, 136),
            ("U4", 32, 19), ("NF4", 32, 20), ("I8", 32, 36),
        ),
        start=len(FORMATS),
    )
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised matrix (O, I); it is immutable, so copies of a model share it."""

    tiles: Tensor
    """uint8 (O / 16, bytes of a tile), O padded to a multiple of 64."""
    kind: Kind
    outputs: int
    inputs: int

    def __deepcopy__(self, memo: dict[int, Any]) -> "Quantised":
        return self

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.outputs, self.inputs))

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes

    @cached_property
    def matrix(self) -> CMatrix:
        """The C structure; its memory is that of `tiles`."""
        return CMatrix(self.tiles.data_ptr(), len(self.tiles), self.inputs // INPUTS, self.kind.number, None)

    def dense(
        self, rows: slice = slice(None), dtype: torch.dtype = torch.float32, room: Tensor | None = None
    ) -> Tensor:
        """Return the values (O', I) of some outputs; they may lie in `room`, float32 for all of their tiles.

        Raises:
            MemoryError: there is not enough for them.
        """
        start, stop, step = rows.indices(self.outputs)
        if step != 1:
            raise ValueError("rows must follow each other")
        first = start // OUTPUTS
        values = self._values(torch.arange(first, max(first, -(-stop // OUTPUTS))), dtype, room)
        return values[start - first * OUTPUTS : stop - first * OUTPUTS]

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values (…, I) of the outputs (…).

        Raises:
            IndexError: there is no such output.
        """
        if len(index.flatten()) and not 0 <= int(index.min()) <= int(index.max()) < self.outputs:
            raise IndexError(f"index out of range of {self.outputs} rows")
        tiles, place = (index // OUTPUTS).unique(return_inverse=True)
        place = place * OUTPUTS + index % OUTPUTS
        y = torch.empty(*index.shape, self.inputs, dtype=dtype)
        at = 0
        for part in tiles.split(max(1, PART // (OUTPUTS * self.inputs))):
            here = (at <= place) & (place < at + len(part) * OUTPUTS)
            y[here] = self._values(part, dtype)[place[here] - at]
            at += len(part) * OUTPUTS
        return y

    def values(self, index: Tensor) -> Tensor:
        """Return single values (n,), each by its place in the matrix row by row: fast for some thousands."""
        y, index = torch.empty(len(index)), index.contiguous()
        any_library().loradeck_values(ctypes.byref(self.matrix), index.data_ptr(), len(index), y.data_ptr())
        return y

    def _values(self, tiles: Tensor, dtype: torch.dtype, room: Tensor | None = None) -> Tensor:
        """Return the values (16 n, I) of n tiles."""
        shape, stored = (self.inputs, len(tiles) * OUTPUTS), dtype if dtype in FORMATS else torch.float32
        try:
            if room is None:
                turned = torch.empty(shape, dtype=stored)
            else:
                turned = room.view(stored)[: math.prod(shape)].view(shape)
        except RuntimeError as error:  # torch has none of its own for memory
            raise MemoryError(NO_MEMORY) from error
        c = CPlain(self.matrix, turned.data_ptr(), tiles.data_ptr(), len(tiles), FORMATS[stored])
        any_library().loradeck_plain(ctypes.byref(c), torch.get_num_threads())
        return turned.T.to(dtype)


def pack(data: Tensor, kind: Kind, inputs: int, order: Tensor | None = None) -> Quantised:
    """Lay the blocks of a GGUF file out in tiles: a copy, after which the file is not needed.

    Args:
        data: uint8 (O, bytes of a row), which may be a view of a memory map.
        kind: What the blocks are.
        inputs: How many there are, a multiple of the kind's.
        order: (O,) the file's row of each output, if they differ.

    Raises:
        ValueError: the sizes do not fit each other.
        OSError: the code cannot be compiled.
        MemoryError: there is not enough for the copy.
    """
    if data.dtype != torch.uint8 or data.dim() != 2 or inputs % kind.inputs:
        raise ValueError(f"rows of {inputs} inputs are no rows of {kind.name} blocks")
    outputs, size = len(data) if order is None else len(order), inputs // kind.inputs * kind.bytes
    if data.shape[1] != size or (order is not None and len(order) and not 0 <= order.min() <= order.max() < len(data)):
        raise ValueError(f"a row of {inputs} inputs in {kind.name} has {size} bytes, not {data.shape[1]}")
    library, groups = any_library(), inputs // INPUTS
    count = padded(outputs, 4 * OUTPUTS) // OUTPUTS
    data, order = data.contiguous(), None if order is None else order.contiguous()
    try:
        tiles = torch.empty(count, library.loradeck_tile_bytes(kind.number, groups), dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(NO_MEMORY) from error
    c = CLayout(
        data.data_ptr(), None if order is None else order.data_ptr(), tiles.data_ptr(), size, outputs, groups,
        kind.number, count,
    )  # fmt: skip
    if count and library.loradeck_lay_out(ctypes.byref(c), torch.get_num_threads()):
        raise MemoryError(NO_MEMORY)
    return Quantised(tiles, kind, outputs, inputs)
