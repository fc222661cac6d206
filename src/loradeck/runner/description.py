"""A transformers model read into the table that the compiled step computes.

No class is known by name: a layer must consist of the known parts, and computed alone on a few random tokens it must
give what the definition gives for its row of the table. Of layers of the same kind, the first is computed.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loradeck.base.blocked import EXPERTS, MIXTURE, BlockWeight, expert_shapes
from loradeck.base.frozen import FrozenLinear
from loradeck.base.quantised import QuantisedWeight
from loradeck.lora.layer import LoraLayer
from loradeck.native import reference
from loradeck.native.quantised import Quantised
from loradeck.native.slots import Slot
from loradeck.native.table import Activation, Experts, Layer, Linear, Table
from loradeck.ops.layer_kinds import dense_weight
from loradeck.runner.layer_kind import kind_of
from loradeck.runner.observation import FixedRouter, Observation, observe, with_part

T = TypeVar("T")
TOKENS = 6  # random ones, that each layer is tried with
EXACT, ROUNDED = 1e-4, 5e-2  # share of the largest number, for float32 weights and for others
DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
PLACES = {  # where the norms of a layer stand
    "input_layernorm": "attention_in",
    "post_attention_layernorm": "mlp_in",  # or attention_out, where there are norms that name the feedforward
    "pre_feedforward_layernorm": "mlp_in",
    "post_feedforward_layernorm": "mlp_out",
}


class DescriptionError(ValueError):
    """A model that the table cannot describe; the text says why."""


@torch.no_grad()
def describe(model: nn.Module) -> Table:
    """Return the table of a decoder on the CPU; its weights are the model's own tensors where those are plain.

    A bank on the model may stay: its adapters are no part of the table.

    Raises:
        DescriptionError: the model computes something that the table has no words for.
    """
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise DescriptionError("it is no language model of transformers")
    if model.device.type != "cpu":
        raise DescriptionError(f"it is on {model.device}")
    return _Reader(model).table()


class _Reader:
    """The model that is read, and what has been found on the way."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.decoder: Any = model.get_decoder()
        self.paths = {module: path for path, module in model.named_modules()}
        self.eps: list[float] = []
        """Of each norm that was read."""
        self.activations: list[Activation] = []
        """Of each MLP."""
        self.observations: list[tuple[object, Observation]] = []
        """Of the first layer of each kind."""

    def table(self) -> Table:
        self.check_forwards()
        parts = self.parts(self.decoder, DECODER)
        embedding, dtype, scale = self.embedding(self.part(self.decoder, parts, "embed_tokens"))
        head = self.linear(self.model.get_output_embeddings())
        if head.outputs != embedding.shape[0]:
            raise self.refusal(self.model, "has a head and a token embedding of different sizes")
        modules: list[Any] = [*self.part(self.decoder, parts, "layers").children()]
        norm = self.norm(self.part(self.decoder, parts, "norm"))
        turn = self.part(self.decoder, parts, "rotary_emb")
        kinds = self.rotary_kinds(turn, len(modules))
        rotary = {kind: self.rotary(turn, kind) for kind in dict.fromkeys(kinds)}

        x = torch.randn(TOKENS, embedding.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        rows = [self.layer(module, x, kind, [*rotary].index(kind)) for module, kind in zip(modules, kinds, strict=True)]
        seen = [observation for _, observation in rows]
        heads, head_dim = _same("queries", (each.query.shape[1:] for each in seen))
        config = self.model.config.get_text_config()
        table = Table(
            hidden=embedding.shape[1],
            heads=heads,
            key_heads=_same("key heads", (each.key.shape[1] for each in seen)),
            head_dim=head_dim,
            intermediate=_same(
                "intermediate sizes", (linears["gate"].outputs for layer, _ in rows for linears in layer.mlps)
            ),
            vocabulary=embedding.shape[0],
            eps=_same("norms' eps", self.eps),
            layers=tuple(layer for layer, _ in rows),
            embedding=embedding,
            embedding_scale=scale * getattr(self.decoder, "embedding_multiplier", 1.0),
            norm=norm,
            head=head,
            rotary=tuple(rotary.values()),
            activation=_same("activations", self.activations),
            scale=_same("attention scales", (each.scale for each in seen)),
            softcap=_same("attention caps", (each.softcap for each in seen)),
            residual_scale=_same("residual scales", (getattr(each, "residual_multiplier", 1.0) for each in modules)),
            logit_scale=1 / getattr(config, "logits_scaling", 1.0),
            logit_cap=getattr(config, "final_logit_softcapping", None),
        )
        turned: dict[Observation, int | None] = {}
        for (layer, observation), module in zip(rows, modules, strict=True):
            if observation not in turned:
                turned[observation] = self.agreed(table, layer, observation, x, module).rotary
        return replace(table, layers=tuple(replace(layer, rotary=turned[observation]) for layer, observation in rows))

    def layer(self, module: Any, x: Tensor, kind: str | None, rotary: int) -> tuple[Layer, Observation]:
        """Return a layer's row, and what the first layer of its kind computes of x alone."""
        parts = self.parts(module, {"self_attn", "mlp", "block_sparse_moe", *PLACES})
        attention = self.part(module, parts, "self_attn")
        mlp = self.part(module, parts, "block_sparse_moe" if "block_sparse_moe" in parts else "mlp")
        if not getattr(attention, "is_causal", True):
            raise self.refusal(attention, "lets a token see what follows it")
        projections = self.parts(attention, ATTENTION)
        places = dict(PLACES)
        if any("feedforward" in name for name in parts):
            places["post_attention_layernorm"] = "attention_out"
        norms = {places[name]: self.norm(part) for name, part in parts.items() if name in places}
        o = self.linear(self.part(attention, projections, "o_proj"))
        experts = self.experts(mlp) if "experts" in mlp._modules else None
        products = {} if experts else self.mlp(mlp)
        seen = self.observation(module, x, kind, experts)
        queries, keys = (tensor[0].numel() for tensor in (seen.query, seen.key))
        projected = self.linears(attention, projections, "qkv_proj", {"q": queries, "k": keys, "v": keys})
        return Layer(
            linears={**projected, "o": o, **products},
            attention_in=norms.get("attention_in"),
            attention_out=norms.get("attention_out"),
            mlp_in=norms.get("mlp_in"),
            mlp_out=norms.get("mlp_out"),
            query_norm=self.norm(projections["q_norm"]) if "q_norm" in projections else None,
            key_norm=self.norm(projections["k_norm"]) if "k_norm" in projections else None,
            rotary=rotary,
            window=seen.window,
            experts=experts,
        ), seen

    def mlp(self, module: nn.Module) -> dict[Slot, Linear]:
        parts = self.parts(module, MLP)
        down = self.linear(self.part(module, parts, "down_proj"))
        inner = down.blocked or down.stored.shape[1]
        self.activations.append(self.activation(module))
        return {**self.linears(module, parts, "gate_up_proj", {"gate": inner, "up": inner}), "down": down}

    def experts(self, module: nn.Module) -> Experts:
        """Return a mixture's experts, if its router chooses them by the definition."""
        parts = self.parts(module, MIXTURE)
        router = self.part(module, parts, "router" if "router" in parts else "gate")
        self.parts(router, {"weight"})
        weight = router.get_parameter("weight")
        linear = Linear(self.paths[router], weight, 0, len(weight))
        mlps = self.expert_mlps(parts["experts"])
        if len(mlps) != len(weight):
            raise self.refusal(module, f"has {len(mlps)} experts and a router of {len(weight)}")
        x = torch.randn(TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
        with suppress(TypeError, ValueError, RuntimeError):  # of a router that takes or returns something else
            _, shares, numbers = deepcopy(router).float()(x)  # in which no rounding changes the choice
            for normalised in (False, True):
                experts = Experts(linear, numbers.shape[1], normalised, mlps)
                definition = reference.choose(experts, x)
                if torch.equal(numbers, definition[1]) and _near(shares, definition[0], EXACT):
                    return experts
        raise self.refusal(router, "chooses experts in an unknown way")

    def expert_mlps(self, module: nn.Module) -> tuple[Mapping[Slot, Linear], ...]:
        self.parts(module, {*EXPERTS, "act_fn"})
        shapes, path = expert_shapes(module), self.paths[module]
        if shapes is None:
            raise self.refusal(module, "has weights of an unknown shape")
        gate_up, down = (module.get_parameter(name) for name in EXPERTS)
        hidden, inner = shapes["down_proj"]
        blocked = isinstance(down, BlockWeight)

        def expert(number: int) -> dict[Slot, Linear]:
            both = Linear(f"{path}.gate_up_proj", gate_up[number], 0, inner, blocked=hidden if blocked else 0)
            back = Linear(f"{path}.down_proj", down[number], 0, hidden, blocked=inner if blocked else 0)
            return {"gate": both, "up": replace(both, start=inner), "down": back}

        self.activations.append(self.activation(module))
        return tuple(map(expert, range(len(down))))

    def agreed(self, table: Table, layer: Layer, seen: Observation, x: Tensor, module: nn.Module) -> Layer:
        """Return a layer's row, rotary or without, if its definition computes what the module does."""
        tolerance = EXACT if layer.dtypes == {torch.float32} else ROUNDED
        hidden = x.float()
        inside = reference.norm(hidden, layer.attention_in, table.eps)
        for each in (layer, replace(layer, rotary=None)):
            query, key = reference.queries_and_keys(table, each, inside)
            if _near(seen.query, query, tolerance) and _near(seen.key, key, tolerance):
                layer = each
                break
        else:
            raise self.refusal(module, "norms or turns its queries and keys in an unknown way")
        choice = FixedRouter(layer.experts, x).choice if layer.experts else None
        y = reference.layer_output(table, layer, hidden, choice=choice)
        rounding = 2 * torch.finfo(x.dtype).eps * y.abs().max()
        if not _near(seen.output.float() - hidden, y - hidden, tolerance, float(rounding)):
            raise self.refusal(module, "computes something else than its parts suggest")
        return layer

    def observation(self, module: nn.Module, x: Tensor, kind: str | None, experts: Experts | None) -> Observation:
        kind_of_layer = kind, kind_of(module)
        for known, seen in self.observations:
            if known == kind_of_layer:
                return seen
        seen = self.observe(module, x, kind, experts)
        if not seen.uses_number:
            self.observations.append((kind_of_layer, seen))
        return seen

    def observe(self, module: nn.Module, x: Tensor, kind: str | None, experts: Experts | None) -> Observation:
        positions = _positions(self.decoder.rotary_emb, x, TOKENS, kind)
        layer = module
        if experts:
            path = experts.router.path.removeprefix(f"{self.paths[module]}.").split(".")
            layer = with_part(module, path, FixedRouter(experts, x))
        try:
            seen = observe(layer, x, position_embeddings=positions, position_ids=torch.arange(TOKENS)[None])
        except Exception as error:
            text = str(error).partition("\n")[0]
            raise DescriptionError(f"its `{self.paths[module]}` cannot be computed alone: {text}") from error
        if seen.others:
            raise self.refusal(module, f"has an attention that also takes `{seen.others[0]}`")
        return seen

    def linears(
        self, owner: nn.Module, parts: Mapping[str, nn.Module], fused: str, sizes: dict[Slot, int]
    ) -> dict[Slot, Linear]:
        """Return the linears of some slots: slices of a fused module in this order, or a module each."""
        if fused in parts:
            whole, starts = self.linear(parts[fused]), accumulate(sizes.values(), initial=0)
            if whole.outputs != sum(sizes.values()):
                raise self.refusal(parts[fused], f"has {whole.outputs} outputs, not {sum(sizes.values())}")
            return {
                slot: replace(whole, start=start, outputs=size)
                for (slot, size), start in zip(sizes.items(), starts, strict=False)
            }
        linears: dict[Slot, Linear] = {}
        for slot, size in sizes.items():
            module = self.part(owner, parts, f"{slot}_proj")
            linears[slot] = self.linear(module)
            if linears[slot].outputs != size:
                raise self.refusal(module, f"has {linears[slot].outputs} outputs, not {size}")
        return linears

    def linear(self, module: nn.Module) -> Linear:
        if not isinstance(module, FrozenLinear) and type(module).forward is not nn.Linear.forward:
            raise self.refusal(module, f"is no plain linear layer but a {type(module).__name__}")
        linear = cast("nn.Linear", module)
        weight: Tensor | Quantised = linear.weight
        blocked = linear.in_features if isinstance(weight, BlockWeight) else 0
        if isinstance(weight, QuantisedWeight):
            weight = weight.quantised
        elif not blocked:
            weight = dense_weight(module)
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            raise self.refusal(module, f"has a weight in {weight.dtype}")
        return Linear(self.paths[module], weight, 0, linear.out_features, linear.bias, blocked)

    def embedding(self, module: nn.Module) -> tuple[Tensor | Quantised, torch.dtype, float]:
        """Return the weight, the dtype of what is looked up, and a factor of it (Gemma's)."""
        if not isinstance(module, nn.Embedding):
            raise self.refusal(module, "is no embedding")
        tokens = torch.arange(min(TOKENS, module.num_embeddings))
        rows = module(tokens)
        weight = module.weight.quantised if isinstance(module.weight, QuantisedWeight) else module.weight
        scale = float(torch.as_tensor(getattr(module, "embed_scale", 1.0)).to(rows.dtype))
        plain = weight.rows(tokens) if isinstance(weight, Quantised) else weight[tokens].float()
        if not _near(rows, plain * scale, EXACT if rows.dtype == torch.float32 else ROUNDED):
            raise self.refusal(module, "does more than look up rows")
        return weight, rows.dtype, scale

    def norm(self, module: Any) -> Tensor:
        """Return what an RMS norm multiplies by: its weight, or one more (Gemma's)."""
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if eps is None or [name for name, _ in module.named_parameters()] != ["weight"]:
            raise self.refusal(module, "is no RMS norm")
        stored: Tensor = module.weight.float()
        x = torch.randn(2, len(stored), generator=torch.Generator().manual_seed(0))
        x[1] *= eps**0.5  # where eps matters
        y = module(x)
        for weight in (stored, 1 + stored):
            if _near(y, reference.norm(x, weight, eps), EXACT):
                self.eps.append(eps)
                return weight
        raise self.refusal(module, "is no RMS norm")

    def activation(self, mlp: Any) -> Activation:
        function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
        x = torch.linspace(-6, 6, 256)
        for name, known in reference.ACTIVATIONS.items():
            if function is not None and _near(function(x), known(x), EXACT / 10):  # two of them differ by 5e-4
                return name
        raise self.refusal(mlp, f"has an unknown activation, {type(function).__name__}")

    def rotary_kinds(self, rotary: nn.Module, layers: int) -> list[str | None]:
        """Return each layer's kind of rotary embedding; None where the model has one for all."""
        several = isinstance(getattr(rotary, "rope_type", None), dict)
        return self.decoder.config.layer_types if several else [None] * layers

    def rotary(self, module: Any, kind: str | None) -> Callable[[int], tuple[Tensor, Tensor]]:
        rope: Any = getattr(module, "rope_type", "default")
        name = rope if kind is None else rope.get(kind)
        if name is None:
            raise self.refusal(module, f"does not turn the layers of kind `{kind}`")
        if "dynamic" in name or name == "longrope":
            raise self.refusal(module, f"depends on the length of the text ({name})")
        like = torch.zeros(1)

        def angles(count: int) -> tuple[Tensor, Tensor]:
            cos, sin = _positions(module, like, count, kind)
            half = cos.shape[2] // 2
            return cos[0, :, :half], sin[0, :, :half]

        left, right = _positions(module, like, TOKENS, kind)[0].chunk(2, dim=2)
        if not torch.equal(left, right):
            raise self.refusal(module, "is not laid out for the two halves of a head")
        return angles

    def check_forwards(self) -> None:
        for module in self.model.modules():
            forward = vars(module).get("forward")
            ours = isinstance(forward, LoraLayer) and forward.restored is None
            if forward is not None and not ours:
                raise self.refusal(module, "has a forward that another tool has replaced")
            if module._forward_hooks or module._forward_pre_hooks:
                raise self.refusal(module, "has a hook")

    def parts(self, module: nn.Module, known: Set[str]) -> dict[str, nn.Module]:
        """Return a module's parts by name; dropout, which does nothing here, is none."""
        parts = {name: child for name, child in module.named_children() if not isinstance(child, nn.Dropout)}
        for name in (*parts, *module._parameters):
            if name not in known:
                raise self.refusal(module, f"has an unknown part, `{name}`")
        return parts

    def part(self, owner: nn.Module, parts: Mapping[str, nn.Module], name: str) -> nn.Module:
        if name not in parts:
            raise self.refusal(owner, f"has no part `{name}`")
        return parts[name]

    def refusal(self, module: nn.Module, reason: str) -> DescriptionError:
        path = self.paths[module]
        return DescriptionError(f"its `{path}` {reason}" if path else f"it {reason}")


def _positions(rotary: nn.Module, like: Tensor, count: int, kind: str | None) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the first positions as a model's layers take them, (1, count, R)."""
    return rotary(like, torch.arange(count)[None], *([] if kind is None else [kind]))


def _same(noun: str, values: Iterable[T]) -> T:
    different = [*dict.fromkeys(values)]
    if len(different) != 1:
        raise DescriptionError(
            f"its layers have different {noun}: {', '.join(map(str, different)) or 'there are none'}"
        )
    return different[0]


def _near(result: Tensor, definition: Tensor, tolerance: float, rounding: float = 0.0) -> bool:
    """Whether two tensors differ by at most a share of the largest number. NaN is near to nothing."""
    difference = (result.float() - definition).abs().max()
    return bool(difference <= tolerance * definition.abs().max() + rounding)
