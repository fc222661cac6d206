"""What a table says of a model is what the model computes, or the model is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.decoders import MODELS, REFUSED, SIZES, build, text
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from loradeck.base.frozen import LayoutLinear
from loradeck.base.load import Base
from loradeck.base.weights import Weights, prepare, set_quantised
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.native import reference
from loradeck.native.quantised import Quantised
from loradeck.native.reference import logits
from loradeck.runner.description import DescriptionError, describe

pytestmark = pytest.mark.usefixtures("one_thread")


def same(model: PreTrainedModel, tolerance: float = 1e-4, tokens: Tensor | None = None) -> bool:
    tokens = text() if tokens is None else tokens
    with torch.no_grad():
        expected = model(input_ids=tokens[None]).logits[0].float()
    result = logits(describe(model), tokens)
    assert result.shape == expected.shape
    return bool((result - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_the_definition_computes_what_the_model_does(name: str) -> None:
    kind, settings = MODELS[name]
    assert same(build(kind, {**SIZES, **settings}))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_table_has_no_words_for_is_refused(name: str) -> None:
    kind, settings, reason = REFUSED[name]
    with pytest.raises(DescriptionError, match=reason):
        describe(build(kind, settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "gemma3", "olmo2", "smollm3", "mixtral", "qwen3-moe"])
def test_half_precision_is_described_with_its_own_tensors(name: str, dtype: torch.dtype) -> None:
    kind, settings = MODELS[name]
    model = build(kind, {**SIZES, **settings}, dtype)
    table = describe(model)
    assert table.layers[0].linears["q"].stored is model.get_decoder().layers[0].self_attn.q_proj.weight
    assert (table.head.stored is table.embedding) == model.config.tie_word_embeddings
    result, expected = logits(table, text()), logits(describe(model.float()), text())
    assert (result - expected).abs().max() <= 2e-2 * expected.abs().max()  # Gemma's scale is rounded


def test_a_bank_may_stay(tiny: LlamaForCausalLM) -> None:
    before = describe(tiny)
    bank = Bank(tiny)
    bank.add("poet", LoraConfig(r=4, target_modules="all-linear"))
    after = describe(tiny)
    assert torch.equal(logits(before, text()), logits(after, text()))
    assert {linear.path for layer in after.layers for linear in layer.linears.values()} <= set(bank["poet"].sites)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_stay_so(weights: Weights) -> None:
    model = build("gemma3_text", {**SIZES, **MODELS["gemma3"][1], "intermediate_size": 64, "tie_word_embeddings": True})
    prepare(model, weights)
    table = describe(model)
    assert {type(linear.stored) for layer in table.layers for linear in layer.linears.values()} == {Quantised}
    assert table.embedding is table.head.stored
    assert same(model)


@pytest.mark.parametrize("weights", ["packed", "blocks"])
def test_weights_of_another_layout_are_those_they_were(weights: Weights) -> None:
    model = build("llama", {**SIZES, "hidden_size": 256, "intermediate_size": 520, "num_hidden_layers": 1})
    plain = describe(model)
    prepare(model, weights)
    table = describe(model)
    if not isinstance(model.get_decoder().layers[0].mlp.up_proj, LayoutLinear):
        pytest.skip(f"this machine has no {weights} float32 weights")
    for slot, linear in plain.layers[0].linears.items():
        assert torch.equal(table.layers[0].linears[slot].weight[: linear.outputs], linear.weight)
    assert torch.equal(logits(table, text()), logits(plain, text()))


def add_hook(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def replace_forward(model: LlamaForCausalLM) -> None:
    layer: Any = model.model.layers[1].mlp.up_proj
    layer.forward = lambda x: 2 * x


def add_module(model: LlamaForCausalLM) -> None:
    model.model.layers[1].router = nn.Linear(2, 2)


def change_eps(model: LlamaForCausalLM) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def clamp(model: LlamaForCausalLM) -> None:
    class Clamped(type(model.model.layers[1].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(-1e-3, 1e-3)

    model.model.layers[1].mlp.__class__ = Clamped


def scale_one_layer(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.scaling = 1.0


def narrow_values(model: LlamaForCausalLM) -> None:
    model.model.layers[1].self_attn.v_proj = nn.Linear(64, 16, bias=False)


def other_linear(model: LlamaForCausalLM) -> None:
    class Ternary(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.sign().T

    model.model.layers[1].mlp.up_proj.__class__ = Ternary


def other_attention(model: LlamaForCausalLM) -> None:
    attention: Any = model.model.layers[1].self_attn

    class Linear(type(attention)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return self.o_proj(self.q_proj(hidden_states)), None

    attention.__class__ = Linear


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_hook, "`model.layers.1.mlp` has a hook"),
        (replace_forward, "`model.layers.1.mlp.up_proj` has a forward that another tool has replaced"),
        (add_module, "`model.layers.1` has an unknown part, `router`"),
        (change_eps, "its layers have different norms' eps: 1e-06, 0.5"),
        (clamp, "`model.layers.1` computes something else than its parts suggest"),
        (scale_one_layer, "its layers have different attention scales: 0.25, 1.0"),
        (narrow_values, "`model.layers.1` cannot be computed alone"),
        (other_linear, "`model.layers.1.mlp.up_proj` is no plain linear layer but a Ternary"),
        (other_attention, "`model.layers.1` cannot be computed alone: its attention is not one"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_changed_layer_is_refused(
    tiny: LlamaForCausalLM, change: Callable[[LlamaForCausalLM], None], reason: str
) -> None:
    describe(tiny)
    change(tiny)
    with pytest.raises(DescriptionError, match=reason):
        describe(tiny)


def use_number(use: Callable[[int], float]) -> Callable[[LlamaForCausalLM], None]:
    """Return a change of all layers to a class whose attention depends on the layer's number, in the second layer."""

    def change(model: LlamaForCausalLM) -> None:
        class Numbered(type(model.model.layers[0].self_attn)):  # type: ignore[misc]
            def forward(self, *args: Any, **arguments: Any) -> tuple[Tensor, None]:
                y, weights = super().forward(*args, **arguments)
                return y * use(self.layer_idx), weights

        for layer in model.model.layers:
            layer.self_attn.__class__ = Numbered

    return change


@pytest.mark.parametrize(
    "use",
    [
        lambda number: number + 1,
        lambda number: [1, 2][number],
        lambda number: {0: 1, 1: 2}[number],
        lambda number: 2 if number == 1 else 1,
        lambda number: 1 if number in (0, 7) else 2,
        lambda number: 2 if number else 1,
        lambda number: 2 if f"layer {number}" == "layer 1" else 1,
        lambda number: 1 + float(number),
    ],
    ids=["sum", "list", "dict", "equal", "in", "bool", "text", "float"],
)
def test_a_layer_that_depends_on_its_number_is_tried(tiny: LlamaForCausalLM, use: Callable[[int], float]) -> None:
    use_number(use)(tiny)
    with pytest.raises(DescriptionError, match=r"`model.layers.1` computes something else than its parts suggest"):
        describe(tiny)


def tried(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many of a model's layers are compared with the definition."""
    outputs: list[Tensor] = []

    def layer_output(*args: Any, **options: Any) -> Tensor:
        outputs.append(definition(*args, **options))
        return outputs[-1]

    definition = reference.layer_output
    with monkeypatch.context() as patch:
        patch.setattr(reference, "layer_output", layer_output)
        describe(model)
    return len(outputs)


@pytest.mark.parametrize(
    ("name", "kinds"), [("llama", 1), ("qwen2-window", 2), ("gemma3", 2), ("smollm3", 2), ("mixtral", 1)]
)
def test_one_layer_of_each_kind_is_tried(name: str, kinds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = MODELS[name]
    model = build(kind, {**SIZES, **settings})
    assert len(model.get_decoder().layers) > kinds
    assert tried(model, monkeypatch) == kinds


def quantise_one(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[1].mlp.up_proj
    set_quantised([layer], layer.weight, "int8", "up_proj")


def set_attribute(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.limit = [7.0]


def set_buffer(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.register_buffer("limit", torch.ones(2))


@pytest.mark.parametrize("change", [quantise_one, set_attribute, set_buffer])
def test_a_layer_that_differs_is_tried(
    tiny: LlamaForCausalLM, change: Callable[[LlamaForCausalLM], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tried(tiny, monkeypatch)
    change(tiny)
    assert tried(tiny, monkeypatch) == before + 1


def sharpen_router(mixture: Any) -> None:
    class Sharp(type(mixture.gate)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
            return super().forward(2 * hidden_states)

    mixture.gate.__class__ = Sharp


def shorten_router(mixture: Any) -> None:
    class Short(type(mixture.gate)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
            return super().forward(hidden_states)[1:]

    mixture.gate.__class__ = Short


def widen_router(mixture: Any) -> None:
    mixture.gate.weight = nn.Parameter(torch.cat((mixture.gate.weight, mixture.gate.weight)), requires_grad=False)


def swap_halves(mixture: Any) -> None:
    class Swapped(type(mixture.experts)):  # type: ignore[misc]
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            up, gate = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate) * up

    mixture.experts.__class__ = Swapped
    mixture.experts.config._experts_implementation = "batched_mm"


def turn_weights(mixture: Any) -> None:
    weight = mixture.experts.gate_up_proj.transpose(1, 2).contiguous()
    mixture.experts.gate_up_proj = nn.Parameter(weight, requires_grad=False)


def scale_mixture(mixture: Any) -> None:
    class Scaled(type(mixture)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 1.5 * super().forward(hidden_states)

    mixture.__class__ = Scaled


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sharpen_router, "`model.layers.1.mlp.gate` chooses experts in an unknown way"),
        (shorten_router, "`model.layers.1.mlp.gate` chooses experts in an unknown way"),
        (widen_router, "`model.layers.1.mlp` has 5 experts and a router of 10"),
        (swap_halves, "`model.layers.1` computes something else than its parts suggest"),
        (turn_weights, "`model.layers.1.mlp.experts` has weights of an unknown shape"),
        (scale_mixture, "`model.layers.1` computes something else than its parts suggest"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_changed_mixture_is_refused(change: Callable[[Any], None], reason: str) -> None:
    model: Any = build("mixtral", {**SIZES, **MODELS["mixtral"][1]})
    describe(model)
    change(model.model.layers[1].mlp)
    with pytest.raises(DescriptionError, match=reason):
        describe(model)


def test_no_language_model_is_refused() -> None:
    with pytest.raises(DescriptionError, match="no language model"):
        describe(nn.Linear(2, 2))


def test_describing_leaves_the_model_as_it_is(tiny: LlamaForCausalLM) -> None:
    names = [name for name, _ in tiny.named_modules()]
    attention = tiny.model.layers[0].self_attn
    before = tiny(input_ids=text()[None]).logits
    describe(tiny)
    assert [name for name, _ in tiny.named_modules()] == names
    assert tiny.config._attn_implementation == attention.config._attn_implementation == "sdpa"
    assert "call" not in vars(attention)
    assert torch.equal(tiny(input_ids=text()[None]).logits, before)


@pytest.mark.real
def test_the_real_model(smollm2: Base) -> None:
    tokens = torch.tensor(smollm2.tokenizer("The capital of France is Paris, and its rivers are many.").input_ids)
    assert same(smollm2.model, tokens=tokens)
