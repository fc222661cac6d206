"""A table's weights as the step reads them: matrices in blocks, padded where a width is no multiple of a block."""

from collections.abc import Mapping
from ctypes import Array
from dataclasses import replace
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from loradeck.native.blocks import FORMATS, INPUTS, OUTPUTS, pack, pad, padded, unpack
from loradeck.native.library import NORMS, CExperts, CLayer, CMatrix, CModel, int8_pays, library, options_for
from loradeck.native.quantised import Quantised
from loradeck.native.slots import SLOTS, Slot
from loradeck.native.table import Experts, Layer, Linear, Table

HEAD_OUTPUTS = 64  # of one unit of the head
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class Width(NamedTuple):
    """A matrix's outputs or inputs: so many parts, each of which the step pads."""

    parts: int
    size: int
    padded: int

    @property
    def total(self) -> int:
        return self.parts * self.padded


class NativeModel:
    """A model in the step's own memory. It does not see later changes of the table's tensors.

    Attributes:
        c: the C structure.
        widths: outputs and inputs of each matrix of a layer.
        page_bytes: what 32 tokens of a sequence take in the KV cache.
    """

    def __init__(self, table: Table, *, halves: bool, int8: bool | None = False) -> None:
        """Pack a model. `halves`: multiply in bfloat16, in which all weights must be then that are not quantised.

        Raises:
            ValueError: the weights have a dtype, or a mixture of them, that cannot be computed; or int8 activations are
                asked for, and no weights are quantised that take them.
            OSError: the step cannot be compiled.
        """
        self.table, self.halves = table, halves
        self.library = library(options_for(halves=halves))
        hidden, inter, head_dim = (padded(size, INPUTS) for size in (table.hidden, table.intermediate, table.head_dim))
        self.vocabulary = padded(table.vocabulary, HEAD_OUTPUTS)
        self._hidden = Width(1, table.hidden, hidden)
        inters = Width(1, table.intermediate, inter)
        queries = Width(table.heads, table.head_dim, head_dim)
        keys = Width(table.key_heads, table.head_dim, head_dim)
        self.widths: Mapping[Slot, tuple[Width, Width]] = {
            "q": (queries, self._hidden), "k": (keys, self._hidden), "v": (keys, self._hidden),
            "o": (self._hidden, queries),
            "gate": (inters, self._hidden), "up": (inters, self._hidden), "down": (self._hidden, inters),
        }  # fmt: skip
        self._memory: list[Tensor] = []
        self._takes_int8 = False
        self._matrices: list[Array[CMatrix]] = []
        """Of each layer's experts."""
        self._lock = Lock()
        self._rotary_length = 0
        self._layers = (CLayer * len(table.layers))(*map(self._layer, table.layers))
        tied = table.embedding is table.head.stored
        head = self._matrix(table.head, Width(1, table.vocabulary, self.vocabulary), self._hidden)
        lookup, embedding = head, None
        if isinstance(table.embedding, Quantised):
            lookup = head if tied else table.embedding.matrix
            self._memory.append(table.embedding.tiles)
        elif not tied:
            embedding = table.embedding.detach().contiguous()
        self.c = CModel(
            layers=len(table.layers),
            hidden=hidden,
            heads=table.heads,
            key_heads=table.key_heads,
            dim=head_dim,
            inter=inter,
            vocabulary=self.vocabulary,
            true_hidden=table.hidden,
            true_dim=table.head_dim,
            activation=ACTIVATIONS[table.activation],
            cache_format=FORMATS[self._cache_dtype()],
            embedding_format=0 if embedding is None else FORMATS[embedding.dtype],
            rounds=self._rounds(int8),
            layer=self._layers,
            embedding=None if embedding is None else self._address(embedding),
            norm=self._floats(table.norm, self._hidden),
            lookup=lookup,
            head=head,
            eps=table.eps,
            embedding_scale=table.embedding_scale,
            scale=table.scale,
            softcap=table.softcap or 0.0,
            residual_scale=table.residual_scale,
            logit_scale=table.logit_scale,
            logit_cap=table.logit_cap or 0.0,
        )
        self.page_bytes: int = self.library.loradeck_page_bytes(self.c)
        self.table = _without_weights(table)

    @property
    def int8(self) -> bool:
        """Whether quantised matrices are multiplied with int8 activations."""
        return bool(self.c.rounds)

    @int8.setter
    def int8(self, rounds: bool) -> None:
        self.c.rounds = rounds

    def reach(self, positions: int) -> None:
        """Make the tables of cos and sin as long as a step needs them."""
        with self._lock:
            if positions <= self._rotary_length:
                return
            length = max(2 * self._rotary_length, padded(positions, 1024))
            tables = [rotary(length) for rotary in self.table.rotary]
            addresses = [(self._address(cos.float()), self._address(sin.float())) for cos, sin in tables]
            for layer, c in zip(self.table.layers, self._layers, strict=True):
                if layer.rotary is not None:  # a step in another thread may still read the shorter tables
                    c.cos, c.sin = addresses[layer.rotary]
                    c.turned = 2 * tables[layer.rotary][0].shape[1]
            self._rotary_length = length

    # ---- packing

    def _layer(self, layer: Layer) -> CLayer:
        matrices = (self._matrix(layer.linears[slot], *self.widths[slot]) for slot in SLOTS if slot in layer.linears)
        queries, keys = self.widths["q"][0], self.widths["k"][0]
        norms_all = any(norm is not None and len(norm) != queries.size for norm in (layer.query_norm, layer.key_norm))
        each = (queries, keys) if norms_all else (queries._replace(parts=1), keys._replace(parts=1))
        widths = (*[self._hidden] * 4, *each)
        norms = {name: self._floats(getattr(layer, name), width) for name, width in zip(NORMS, widths, strict=True)}
        return CLayer(
            (CMatrix * len(SLOTS))(*matrices),
            **norms,
            window=layer.window or 0,
            norms_all=norms_all,
            experts=self._experts(layer.experts) if layer.experts else CExperts(),
        )

    def _experts(self, experts: Experts) -> CExperts:
        slots: tuple[Slot, ...] = ("gate", "up", "down")
        matrices = [self._matrix(linears[slot], *self.widths[slot]) for linears in experts.mlps for slot in slots]
        outputs = Width(1, experts.router.outputs, padded(experts.router.outputs, OUTPUTS))
        c_matrices = (CMatrix * len(matrices))(*matrices)
        self._matrices.append(c_matrices)
        return CExperts(
            router=self._matrix(experts.router, outputs, self._hidden),
            matrices=c_matrices,
            count=len(experts.mlps),
            chosen=experts.chosen,
            normalised=experts.normalised,
        )

    def _matrix(self, linear: Linear, outputs: Width, inputs: Width) -> CMatrix:
        rows = slice(linear.start, linear.start + linear.outputs)
        bias = None if linear.bias is None else self._floats(linear.bias[rows], outputs)
        quantised = self._quantised(linear, outputs, inputs)
        if quantised is not None:
            quantised.bias = bias
            return quantised
        blocks = self._blocks(linear, outputs, inputs)
        if blocks.dtype not in FORMATS:
            raise ValueError(f"its weights are in {blocks.dtype}")
        if self.halves and blocks.dtype != torch.bfloat16:
            raise ValueError(f"its weights are in {blocks.dtype}, not in bfloat16")
        return CMatrix(self._address(blocks), blocks.shape[0], blocks.shape[1], FORMATS[blocks.dtype], bias)

    def _quantised(self, linear: Linear, outputs: Width, inputs: Width) -> CMatrix | None:
        """Return a quantised matrix, of the tiles in which it lies; None if it is none, or its rows lie in no tiles."""
        weight = linear.stored
        if not isinstance(weight, Quantised) or linear.start % OUTPUTS or _padded_apart(outputs, inputs):
            return None
        # A fused module's next rows may lie where these are padded.
        if outputs.size != outputs.padded and linear.start + linear.outputs != weight.outputs:
            return None
        first = linear.start // OUTPUTS
        tiles = weight.tiles[first : first + outputs.total // OUTPUTS]
        if len(tiles) * OUTPUTS != outputs.total:
            return None
        self._takes_int8 |= weight.kind.takes_int8
        return CMatrix(self._address(tiles), len(tiles), inputs.total // INPUTS, weight.kind.number)

    def _blocks(self, linear: Linear, outputs: Width, inputs: Width) -> Tensor:
        """Return a matrix's blocks: where possible those that it lies in."""
        rows = slice(linear.start, linear.start + linear.outputs)
        stored = linear.stored
        if (
            isinstance(stored, Tensor)
            and linear.blocked
            and not _padded_apart(outputs, inputs)
            and linear.start % OUTPUTS == 0
        ):
            first = linear.start // OUTPUTS
            tiles = stored.detach()[first : first + outputs.total // OUTPUTS]
            whole = len(tiles) * OUTPUTS == outputs.total
            # A fused module's next rows may lie where these are padded.
            rest = tiles[outputs.size // OUTPUTS :] if outputs.size != outputs.padded else tiles[:0]
            if whole and not unpack(rest)[outputs.size % OUTPUTS :].any():
                return tiles
        weight = linear.weight
        if isinstance(stored, Quantised) and self.halves:
            weight = weight.bfloat16()
        parts = weight[rows].detach().reshape(outputs.parts, outputs.size, inputs.parts, inputs.size)
        parts = pad(parts, outputs.parts, outputs.padded, inputs.parts, inputs.padded)
        return pack(parts.reshape(outputs.total, inputs.total))

    def _floats(self, tensor: Tensor | None, width: Width | None = None) -> int | None:
        """Return the address of one number, in float32, for each of some outputs."""
        if tensor is None:
            return None
        width = width or Width(1, len(tensor), len(tensor))
        return self._address(pad(tensor.detach().float().reshape(width.parts, width.size), width.parts, width.padded))

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._memory.append(tensor)
        return tensor.data_ptr()

    def _rounds(self, int8: bool | None) -> bool:
        """`None`: where int8 activations pay."""
        if int8 and not self._takes_int8:
            raise ValueError("it has no quantised weights that take them")
        return self._takes_int8 and (int8_pays(halves=self.halves) if int8 is None else int8)

    def _cache_dtype(self) -> torch.dtype:
        """Return the dtype of keys and values."""
        dtypes = {dtype for layer in self.table.layers for dtype in layer.dtypes}
        if not dtypes:  # all are quantised
            return torch.bfloat16 if self.halves else torch.float32
        if len(dtypes) > 1:
            raise ValueError(f"its layers mix {' and '.join(sorted(map(str, dtypes)))}")
        return next(iter(dtypes))


def _padded_apart(*widths: Width) -> bool:
    """Whether the step pads parts of which a matrix has several."""
    return any(width.parts > 1 and width.size != width.padded for width in widths)


def _without_weights(table: Table) -> Table:
    """Return a table that keeps no weights in memory."""
    empty = torch.empty(0)

    def slim(linear: Linear) -> Linear:
        return replace(linear, stored=empty, bias=None)

    layers = (
        replace(layer, linears={slot: slim(linear) for slot, linear in layer.linears.items()}, experts=None)
        for layer in table.layers
    )
    return replace(table, layers=tuple(layers), embedding=empty, head=slim(table.head))
