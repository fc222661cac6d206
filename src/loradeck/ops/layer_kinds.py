"""How each kind of layer applies low-rank weights A, B.

A kind flattens a layer's input to items (what segments count: rows or tokens) and its output to positions:

    linear      items = tokens   (T, in)       positions = tokens (T, out)
    embedding   items = tokens   (T,)          positions = tokens (T, out)
    conv        items = rows     (N, in, *k)   positions = N · output size (P, out)

T tokens, N rows, P positions, r rank.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUPPORTED = "nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d and transformers' Conv1D"


class LayerKind(Protocol):
    """What the update needs to know of a layer."""

    name: str  # "linear" | "embedding" | "conv", as the keys of PEFT's files distinguish them
    fan_in_fan_out: bool  # the weight is stored (in, out)

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and of B at rank r, as PEFT stores them."""
        ...

    def items(self, x: Tensor) -> Tensor:
        """Return the layer's input with items along dimension 0."""
        ...

    def count(self, x: Tensor) -> int:
        """Return how many items an input has."""
        ...

    def shrink(self, items: Tensor, a: Tensor) -> Tensor:
        """A x: items and A -> (P, r)."""
        ...

    def dense_b(self, b: Tensor) -> Tensor:
        """Return B as one matrix (out, r)."""
        ...

    def positions(self, y: Tensor) -> Tensor:
        """Return the layer's output as (P, out), a view of it where one exists."""
        ...

    def restore(self, z: Tensor, y: Tensor) -> Tensor:
        """Return (P, out) in the layout of y."""
        ...

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """B A as one dense change of the layer's weight, in the weight's layout."""
        ...


class LinearKind:
    """nn.Linear and transformers' Conv1D: A (r, in), B (out, r)."""

    name = "linear"

    def __init__(self, in_features: int, out_features: int, *, fan_in_fan_out: bool = False) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.fan_in_fan_out = fan_in_fan_out

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_features), (self.out_features, r)

    def items(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.in_features)

    def count(self, x: Tensor) -> int:
        return x.numel() // self.in_features

    def shrink(self, items: Tensor, a: Tensor) -> Tensor:
        return F.linear(items, a)

    def dense_b(self, b: Tensor) -> Tensor:
        return b

    def positions(self, y: Tensor) -> Tensor:
        return y.reshape(-1, self.out_features)

    def restore(self, z: Tensor, y: Tensor) -> Tensor:
        return z.view(y.shape)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T if self.fan_in_fan_out else b @ a


class EmbeddingKind:
    """nn.Embedding: A (r, num_embeddings), B (embedding_dim, r); scaled embeddings (Gemma) scale the update too."""

    name = "embedding"
    fan_in_fan_out = False

    def __init__(self, module: nn.Embedding) -> None:
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.module = module

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.num_embeddings), (self.embedding_dim, r)

    def items(self, x: Tensor) -> Tensor:
        return x.reshape(-1)

    def count(self, x: Tensor) -> int:
        return x.numel()

    def shrink(self, items: Tensor, a: Tensor) -> Tensor:
        h = F.embedding(items, a.T)
        scale = getattr(self.module, "embed_scale", None)  # a buffer that moves, so read at each call
        return h if scale is None else h * torch.as_tensor(scale, dtype=h.dtype, device=h.device)

    def dense_b(self, b: Tensor) -> Tensor:
        return b

    def positions(self, y: Tensor) -> Tensor:
        return y.reshape(-1, self.embedding_dim)

    def restore(self, z: Tensor, y: Tensor) -> Tensor:
        return z.view(y.shape)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T


class ConvKind:
    """nn.Conv1d and nn.Conv2d: A (r, in, *kernel) convolves as the base does, B (out, r / groups, 1…) mixes."""

    name = "conv"
    fan_in_fan_out = False

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        self.dims = 1 if isinstance(module, nn.Conv1d) else 2
        self.in_channels, self.out_channels, self.groups = module.in_channels, module.out_channels, module.groups
        self.kernel_size: tuple[int, ...] = tuple(module.kernel_size)
        self.geometry: dict[str, Any] = {
            "stride": module.stride,
            "padding": module.padding,
            "dilation": module.dilation,
        }

    def shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_channels, *self.kernel_size), (self.out_channels, r // self.groups, *(1,) * self.dims)

    def items(self, x: Tensor) -> Tensor:
        return x if x.dim() == self.dims + 2 else x.unsqueeze(0)

    def count(self, x: Tensor) -> int:
        return x.shape[0] if x.dim() == self.dims + 2 else 1

    def shrink(self, items: Tensor, a: Tensor) -> Tensor:
        conv = F.conv1d if self.dims == 1 else F.conv2d
        return conv(items, a, **self.geometry).movedim(1, -1).reshape(-1, a.shape[0])

    def dense_b(self, b: Tensor) -> Tensor:
        # A grouped B is block-diagonal: group g of the outputs sees rank slice g.
        return torch.block_diag(*b.flatten(1).chunk(self.groups)) if self.groups > 1 else b.flatten(1)

    def positions(self, y: Tensor) -> Tensor:
        return y.movedim(-self.dims - 1, -1).reshape(-1, self.out_channels)

    def restore(self, z: Tensor, y: Tensor) -> Tensor:
        z = z.view(y.movedim(-self.dims - 1, -1).shape).movedim(-1, -self.dims - 1)
        return z.contiguous() if y.is_contiguous() else z  # other strides select other kernels, which round differently

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        dense = torch.einsum("or,ri...->oi...", self.dense_b(b), a)
        if self.groups == 1:
            return dense
        raise ValueError("the update of a grouped convolution mixes its groups, so no grouped weight can hold it")


def kind_of(module: nn.Module) -> LayerKind | str:
    """Return the module's kind, or the reason why it takes no adapter."""
    if type(module).__name__.endswith("Router"):  # Llama 4's is an nn.Linear
        return "chooses experts: what it returns is no product"
    if isinstance(module, nn.Linear):
        return LinearKind(module.in_features, module.out_features)
    if isinstance(module, nn.Embedding):
        return EmbeddingKind(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        if module.padding_mode != "zeros":
            return f"pads with {module.padding_mode!r}; PEFT's adapters pad with zeros"
        return ConvKind(module)
    if any(f"{t.__module__}.{t.__name__}" == "transformers.pytorch_utils.Conv1D" for t in type(module).__mro__):
        in_features, out_features = module.get_parameter("weight").shape
        return LinearKind(in_features, out_features, fan_in_fan_out=True)
    return f"takes no adapter; {SUPPORTED} do"


def dense_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight as a plain tensor; a layer that stores it in another layout has a method `dense`."""
    dense = getattr(module, "dense", None)
    return dense() if callable(dense) else module.get_parameter("weight")
