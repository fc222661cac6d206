"""Random models as tables, adapters for them, and what they compute by definition, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from tests.native.test_quantised import linear_blocks
from torch import Tensor

from loradeck.native.adapter import NativeAdapter
from loradeck.native.blocks import pack, pad, padded
from loradeck.native.model import NativeModel
from loradeck.native.pages import PAGE
from loradeck.native.quantised import KINDS, Quantised
from loradeck.native.quantised import pack as quantise
from loradeck.native.slots import SLOTS, Slot
from loradeck.native.step import Chunk, run
from loradeck.native.table import Experts, Layer, Linear, Table
from loradeck.ops.weights import LoraWeights

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FUSED: dict[Slot, str] = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
Pairs = dict[str, LoraWeights]
Blend = tuple[tuple[Pairs, float], ...]


@dataclass(frozen=True)
class Shape:
    """What a random model is like."""

    hidden: int = 48
    key_heads: int = 2
    group: int = 2
    head_dim: int = 20
    intermediate: int = 40
    vocabulary: int = 70
    layers: int = 2
    dtype: torch.dtype = torch.float32
    """Of the weights that are not quantised."""
    quantised: str | None = None
    """The kind of the weights whose inputs are whole blocks of it."""
    norms: str = "1011"
    """Which of the norms of attention's and the MLP's input and output there are."""
    head_norm: str = ""
    """Of queries and keys: "each", "all", or none."""
    biases: bool = False
    fused: bool = False
    blocked: bool = False
    """Whether the layers' weights lie in blocks already."""
    tied: bool = False
    rotary: tuple[int | None, ...] = (0,)
    """For each layer in turn."""
    turned: int = 8
    windows: tuple[int | None, ...] = (None,)
    activation: str = "silu"
    softcap: float | None = None
    logit_cap: float | None = None
    experts: tuple[int, ...] = (0,)
    """How many, for each layer in turn; 0: it has one MLP."""
    chosen: int = 2
    normalised: bool = True
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    seed: int = 0


def shapes(**fixed: object) -> st.SearchStrategy[Shape]:
    """Return models of all parts and widths, and some that are the same in each."""
    drawn: dict[str, st.SearchStrategy] = {
        "hidden": st.sampled_from((20, 32, 48, 64, 96, 256)),
        "key_heads": st.sampled_from((1, 2, 3)),
        "group": st.sampled_from((1, 2, 3)),
        "head_dim": st.sampled_from((8, 20, 32, 48, 64, 96)),
        "intermediate": st.sampled_from((24, 32, 100, 256)),
        "vocabulary": st.sampled_from((17, 64, 130)),
        "layers": st.integers(1, 3),
        "dtype": st.sampled_from(FLOATS),
        "quantised": st.sampled_from((*[None] * len(KINDS), *KINDS)),
        "norms": st.sampled_from(("1010", "0101", "1111", "0110")),
        "head_norm": st.sampled_from(("", "each", "all")),
        "biases": st.booleans(),
        "fused": st.booleans(),
        "blocked": st.booleans(),
        "tied": st.booleans(),
        "rotary": st.sampled_from(((0,), (0, 1), (None, 0), (None,))),
        "turned": st.sampled_from((4, 8)),
        "windows": st.sampled_from(((None,), (5,), (40, None))),
        "activation": st.sampled_from(("silu", "gelu", "gelu_tanh")),
        "softcap": st.sampled_from((None, 2.0)),
        "logit_cap": st.sampled_from((None, 3.0)),
        "experts": st.sampled_from(((0,), (3,), (0, 5), (40, 2))),
        "chosen": st.integers(1, 2),
        "normalised": st.booleans(),
        "residual_scale": st.sampled_from((1.0, 0.3)),
        "logit_scale": st.sampled_from((1.0, 0.7)),
        "embedding_scale": st.sampled_from((1.0, 5.0)),
        "seed": st.integers(0, 1000),
    }
    return st.builds(Shape, **drawn | {name: st.just(value) for name, value in fixed.items()})


def table_of(shape: Shape) -> Table:
    """Return a model of a shape, with random weights."""
    generator = torch.Generator().manual_seed(shape.seed)
    heads = shape.key_heads * shape.group

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def norm(there: bool, size: int) -> Tensor | None:
        return 1 + normal(size) / 4 if there else None

    def weight_of(outputs: int, inputs: int) -> Tensor | Quantised:
        kind = KINDS[shape.quantised] if shape.quantised else None
        if kind is None or inputs % kind.inputs:
            return (normal(outputs, inputs) / inputs**0.5).to(shape.dtype)
        seed = int(torch.randint(2**31, (), generator=generator))
        return quantise(torch.from_numpy(linear_blocks(kind, outputs, inputs, seed)), kind, inputs)

    def linears_of(prefix: str, part: tuple[Slot, ...] = SLOTS) -> dict[Slot, Linear]:
        queries, keys = heads * shape.head_dim, shape.key_heads * shape.head_dim
        sizes: dict[Slot, tuple[int, int]] = {
            "q": (queries, shape.hidden),
            "k": (keys, shape.hidden),
            "v": (keys, shape.hidden),
            "o": (shape.hidden, queries),
            "gate": (shape.intermediate, shape.hidden),
            "up": (shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
        }
        modules: dict[str, list[Slot]] = {}
        for slot in part:
            modules.setdefault(FUSED.get(slot, slot) if shape.fused else slot, []).append(slot)
        linears: dict[Slot, Linear] = {}
        for module, slots in modules.items():
            outputs = sum(sizes[slot][0] for slot in slots)
            weight = weight_of(outputs, sizes[slots[0]][1])
            in_blocks = shape.blocked and isinstance(weight, Tensor)
            bias = normal(outputs) / 4 if shape.biases else None
            start = 0
            for slot in slots:
                stored = block(weight) if in_blocks else weight
                blocked = weight.shape[1] if in_blocks else 0
                linears[slot] = Linear(f"{prefix}.{module}", stored, start, sizes[slot][0], bias, blocked)
                start += sizes[slot][0]
        return linears

    def experts_of(number: int, count: int) -> Experts | None:
        if not count:
            return None
        path = f"layers.{number}.experts"
        return Experts(
            Linear(f"{path}.router", weight_of(count, shape.hidden), 0, count),
            shape.chosen,
            shape.normalised,
            tuple(linears_of(f"{path}.{expert}", SLOTS[4:]) for expert in range(count)),
        )

    def layer_of(number: int) -> Layer:
        there = [kind == "1" for kind in shape.norms]
        each = {
            "": (0, 0),
            "each": (shape.head_dim,) * 2,
            "all": (heads * shape.head_dim, shape.key_heads * shape.head_dim),
        }
        queries, keys = each[shape.head_norm]
        experts = experts_of(number, shape.experts[number % len(shape.experts)])
        return Layer(
            linears_of(f"layers.{number}", SLOTS[:4] if experts else SLOTS),
            norm(there[0], shape.hidden),
            norm(there[1], shape.hidden),
            norm(there[2], shape.hidden),
            norm(there[3], shape.hidden),
            norm(bool(queries), queries),
            norm(bool(keys), keys),
            shape.rotary[number % len(shape.rotary)],
            shape.windows[number % len(shape.windows)],
            experts,
        )

    def rotary_of(base: float) -> Callable[[int], tuple[Tensor, Tensor]]:
        def rotary(positions: int) -> tuple[Tensor, Tensor]:
            half = shape.turned // 2
            angles = torch.arange(positions)[:, None] * base ** -(torch.arange(half) / half)
            return angles.cos(), angles.sin()

        return rotary

    weight = weight_of(shape.vocabulary, shape.hidden)
    embedding = weight if shape.tied else weight_of(shape.vocabulary, shape.hidden)
    return Table(
        shape.hidden,
        heads,
        shape.key_heads,
        shape.head_dim,
        shape.intermediate,
        shape.vocabulary,
        1e-5,
        tuple(layer_of(number) for number in range(shape.layers)),
        embedding,
        shape.embedding_scale,
        1 + normal(shape.hidden) / 4,
        Linear("head", weight, 0, shape.vocabulary, normal(shape.vocabulary) / 4 if shape.biases else None),
        (rotary_of(10000.0), rotary_of(100.0)),
        shape.activation,  # type: ignore[arg-type]
        shape.head_dim**-0.5,
        shape.softcap,
        shape.residual_scale,
        shape.logit_scale,
        shape.logit_cap,
    )


def block(weight: Tensor) -> Tensor:
    """Return a module's weight in blocks."""
    outputs, inputs = weight.shape
    return pack(pad(weight, padded(outputs, 64), padded(inputs, 32)))


def adapter_of(table: Table, r: int, dtype: torch.dtype, seed: int, missing: float = 0.2) -> Pairs:
    """Return an adapter of a rank at some of a table's modules."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    last = {each.path: each for layer in table.layers for each in layer.linears.values()}  # of each module
    for linear in last.values():
        if torch.rand((), generator=generator) < missing:
            continue
        outputs, inputs = linear.start + linear.outputs, linear.weight.shape[1]
        a = torch.randn(r, inputs, generator=generator) / inputs**0.5
        b = torch.randn(outputs, r, generator=generator) / r**0.5
        pairs[linear.path] = LoraWeights(a.to(dtype), b.to(dtype), 0.5)
    return pairs


class Sequence:
    """The tokens of one sequence, and its pages, which begin as zeros and are taken in any order."""

    def __init__(self, model: NativeModel, tokens: list[int], blend: Blend = (), seed: int = 0) -> None:
        count = -(-len(tokens) // PAGE)
        self.tokens, self.blend, self.model = tokens, blend, model
        self.uses = tuple((packed(model, pairs), weight) for pairs, weight in blend)
        size = padded(model.page_bytes, 64)
        self.memory = torch.zeros(count * size, dtype=torch.uint8)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        self.table = self.memory.data_ptr() + order * size
        self.computed = 0
        self.logits: list[Tensor] = []

    def chunk(self, count: int) -> Chunk:
        """Return its next tokens; all of them need logits."""
        start, self.computed = self.computed, self.computed + count
        return Chunk(self.tokens[start : self.computed], start, self.table.data_ptr(), self.uses, count)


ADAPTERS: dict[tuple[int, int], tuple[NativeModel, Pairs, NativeAdapter]] = {}


def packed(model: NativeModel, pairs: Pairs) -> NativeAdapter:
    """Return an adapter as a model reads it, the same one for the same pairs."""
    key = (id(model), id(pairs))
    if key not in ADAPTERS or ADAPTERS[key][0] is not model or ADAPTERS[key][1] is not pairs:
        ADAPTERS[key] = model, pairs, NativeAdapter(model, pairs)
    return ADAPTERS[key][2]


def compute(sequences: list[Sequence], chunks: list[list[tuple[int, int]]], threads: int) -> list[Tensor]:
    """Compute steps, each of so many tokens of some sequences by number; return the logits (N, V) of each sequence."""
    for works in chunks:
        logits = run(sequences[0].model, [sequences[i].chunk(count) for i, count in works], threads)
        for (i, _), part in zip(works, logits.split([count for _, count in works]), strict=True):
            sequences[i].logits.append(part)
    return [torch.cat(sequence.logits) for sequence in sequences]
