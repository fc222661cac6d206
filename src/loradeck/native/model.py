"""A table's weights as the step reads them: fused matrices in blocks, padded where a width is no multiple of a block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loradeck.native.blocks import FORMATS, INPUTS, pack, pad, padded
from loradeck.native.library import NORMS, CLayer, CMatrix, CModel, library
from loradeck.native.table import Layer, Linear, Slot, Table

HEAD_OUTPUTS = 64  # of one unit of the head
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class NativeModel:
    """A model in the step's own memory. It does not see later changes of the table's tensors.

    Attributes:
        c: the C structure.
        page_bytes: what 32 tokens of a sequence take in the KV cache.
    """

    def __init__(self, table: Table, *, halves: bool) -> None:
        """Pack a model. `halves`: multiply in bfloat16, in which all weights must be then, or in int8.

        Raises:
            ValueError: the weights have a dtype, or a mixture of them, that cannot be computed.
            OSError: the step cannot be compiled.
        """
        self.table = table
        self.halves = halves
        self.head_dim = padded(table.head_dim, INPUTS)
        self.hidden, self.intermediate = padded(table.hidden, INPUTS), padded(table.intermediate, INPUTS)
        self.vocabulary = padded(table.vocabulary, HEAD_OUTPUTS)
        self._memory: list[object] = []
        self._rotary_length = 0
        self._layers = (CLayer * len(table.layers))(*map(self._layer, table.layers))
        self.library = library(halves)
        dtype = self._dtype()
        tied = table.embedding is table.head.weight
        embedding = table.embedding.detach().contiguous()
        head = self._matrix([self._rows(table.head, 1, table.vocabulary, self.vocabulary, self.hidden)], [table.head], [1])
        self.c = CModel(
            layers=len(table.layers),
            hidden=self.hidden,
            heads=table.heads,
            key_heads=table.key_heads,
            dim=self.head_dim,
            inter=self.intermediate,
            vocabulary=self.vocabulary,
            true_hidden=table.hidden,
            true_dim=table.head_dim,
            activation=ACTIVATIONS[table.activation],
            cache_format=FORMATS[dtype],
            embedding_format=FORMATS[embedding.dtype],
            layer=self._layers,
            embedding=None if tied else self._address(embedding),
            embedding_scales=None if tied else self._floats(table.embedding_scales),
            norm=self._floats(table.norm, self.hidden),
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

    def reach(self, positions: int) -> None:
        """Make the tables of cos and sin as long as a step needs them."""
        if positions <= self._rotary_length:
            return
        self._rotary_length = max(2 * self._rotary_length, padded(positions, 1024))
        self._rotary = [
            [half.float().contiguous() for half in rotary(self._rotary_length)] for rotary in self.table.rotary
        ]
        for layer, c in zip(self.table.layers, self._layers, strict=True):
            if layer.rotary is not None:
                cos, sin = self._rotary[layer.rotary]
                c.cos, c.sin, c.turned = cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[1]

    def shapes(self, slot: Slot) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return for a matrix's outputs and inputs: (parts, width of a part, its padded width)."""
        table = self.table
        hidden = (1, table.hidden, self.hidden)
        inter = (1, table.intermediate, self.intermediate)
        queries = (table.heads, table.head_dim, self.head_dim)
        keys = (table.key_heads, table.head_dim, self.head_dim)
        shapes: dict[Slot, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
            "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
            "gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter),
        }  # fmt: skip
        return shapes[slot]

    # ---- packing

    def _layer(self, layer: Layer) -> CLayer:
        matrices = {}
        for name, slots in (("qkv", ("q", "k", "v")), ("o", ("o",)), ("mlp", ("gate", "up")), ("down", ("down",))):
            linears = [layer.linears[slot] for slot in slots]  # type: ignore[index]
            shapes = [self.shapes(slot) for slot in slots]  # type: ignore[arg-type]
            weights = [
                pad(
                    linear.weight[linear.start : linear.start + linear.outputs].reshape(*outputs[:2], *inputs[:2]),
                    outputs[0], outputs[2], inputs[0], inputs[2],
                ).reshape(outputs[0] * outputs[2], inputs[0] * inputs[2])
                for linear, (outputs, inputs) in zip(linears, shapes, strict=True)
            ]  # fmt: skip
            matrices[name] = self._matrix(weights, linears, [shape[0] for shape in shapes], interleaved=name == "mlp")
        norms_all = layer.query_norm is not None and len(layer.query_norm) != self.table.head_dim
        parts = {"query_norm": self.table.heads, "key_norm": self.table.key_heads} if norms_all else {}
        norms = {}
        for name in NORMS:
            norm: Tensor | None = getattr(layer, name)
            if norm is not None and name in ("query_norm", "key_norm"):
                count = parts.get(name, 1)
                norm = pad(norm.reshape(count, self.table.head_dim), count, self.head_dim).flatten()
            norms[name] = self._floats(norm, self.hidden)
        return CLayer(**matrices, **norms, window=layer.window or 0, norms_all=norms_all)

    def _matrix(
        self, weights: Sequence[Tensor], linears: Sequence[Linear], shapes: Sequence[tuple[int, int, int]], *,
        interleaved: bool = False,
    ) -> CMatrix:  # fmt: skip
        weight = _joined(weights, interleaved)
        if weight.dtype not in FORMATS:
            raise ValueError(f"its weights are in {weight.dtype}")
        if self.halves and weight.dtype not in (torch.bfloat16, torch.int8):
            raise ValueError(f"its weights are in {weight.dtype}, not in bfloat16")
        blocks = pack(weight)
        return CMatrix(
            blocks=self._address(blocks),
            tiles=blocks.shape[0],
            groups=blocks.shape[1],
            format=FORMATS[weight.dtype],
            scales=self._outputs([linear.scales for linear in linears], linears, shapes, interleaved),
            bias=self._outputs([linear.bias for linear in linears], linears, shapes, interleaved),
        )

    def _outputs(
        self, vectors: Sequence[Tensor | None], linears: Sequence[Linear], shapes: Sequence[tuple[int, int, int]],
        interleaved: bool,
    ) -> int | None:  # fmt: skip
        """Return the address of one number for each output of a matrix."""
        if all(vector is None for vector in vectors):
            return None
        parts = []
        for vector, linear, (count, width, larger) in zip(vectors, linears, shapes, strict=True):
            part = torch.zeros(linear.outputs) if vector is None else vector[linear.start : linear.start + linear.outputs]
            parts.append(pad(part.detach().float().reshape(count, width), count, larger).reshape(-1, 1))
        return self._address(_joined(parts, interleaved).flatten())

    def _floats(self, tensor: Tensor | None, size: int = 0) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().float()
        return self._address(pad(tensor, max(size, padded(len(tensor), INPUTS))).contiguous())

    def _address(self, tensor: Tensor) -> int:
        self._memory.append(tensor)
        return tensor.data_ptr()

    def _rows(self, linear: Linear, _: int, outputs: int, larger: int, inputs: int) -> Tensor:
        return pad(linear.weight[linear.start : linear.start + outputs].detach(), larger, inputs)

    def _dtype(self) -> torch.dtype:
        """Return the dtype of keys and values."""
        dtypes = {linear.weight.dtype for layer in self.table.layers for linear in layer.linears.values()}
        if len(dtypes) > 1:
            raise ValueError(f"its layers mix {' and '.join(sorted(map(str, dtypes)))}")
        (dtype,) = dtypes
        if dtype != torch.int8:
            return dtype
        return torch.bfloat16 if self.halves else torch.float32


def _joined(weights: Sequence[Tensor], interleaved: bool) -> Tensor:
    """Return matrices (O, I) one after the other, or two of them in turns of 32 outputs."""
    weights = [weight.detach() for weight in weights]
    if len({weight.dtype for weight in weights}) > 1:
        raise ValueError("it mixes dtypes in one layer")
    if not interleaved:
        return torch.cat([*weights])
    return torch.stack([weight.reshape(-1, INPUTS, weight.shape[1]) for weight in weights], 1).flatten(0, 2)
