"""Folding adapters into the base, and taking them out again bit for bit."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loradeck import Bank, LoraConfig
from loradeck.errors import AdapterError, LoradeckError, RouteError, UnknownAdapterError, UnsupportedError


@pytest.fixture
def bank(tiny, fill):
    bank = Bank(tiny)
    fill(bank.add("a", LoraConfig(r=4)), seed=0, size=0.15)
    fill(
        bank.add("b", LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "embed_tokens", "lm_head"])),
        seed=1,
        size=0.15,
    )
    return bank


def logits(bank, ids, route=None):
    with torch.no_grad(), bank.route(route):
        return bank.model(ids).logits


def weights(model):
    """Every parameter of the base, tied ones under each name: the object and its values."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: (id(p), p.clone()) for name, p in named if "loradeck." not in name}


def unchanged(model, before):
    after = dict(model.named_parameters(remove_duplicate=False))
    return all(id(after[name]) == identity and torch.equal(after[name], p) for name, (identity, p) in before.items())


class TestMerging:
    """Merged is routed, and unmerged is as before."""

    @pytest.mark.parametrize("entry", ["a", "b", {"a": 0.7, "b": 0.3}, {"a": -1.0}, {"a": 0.0, "b": 2}], ids=str)
    def test_merged_is_routed(self, bank, ids, entry):
        before, base = weights(bank.model), logits(bank, ids)
        wanted = logits(bank, ids, entry)
        bank.merge(entry)
        assert torch.allclose(bank.model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(bank.model(ids).logits, base, atol=1e-2)
        bank.unmerge()
        assert unchanged(bank.model, before)
        assert torch.equal(logits(bank, ids), base)
        assert torch.equal(logits(bank, ids, entry), wanted)

    def test_every_kind_of_layer(self, zoo, fill):
        bank, ids = Bank(zoo), torch.randint(11, (4, 6))
        fill(bank.add("a", LoraConfig(r=3, target_modules=["embed", "conv1", "conv2", "mix", "linear"])))
        before, base = weights(zoo), zoo(ids)
        with bank.route("a"):
            wanted = zoo(ids)
        bank.merge("a")
        assert torch.allclose(zoo(ids), wanted, atol=1e-4)
        assert all(p.is_contiguous() for p in zoo.parameters())
        bank.unmerge()
        assert unchanged(zoo, before)
        assert torch.equal(zoo(ids), base)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_narrow_weights_are_rounded_once(self, bank, ids, dtype):
        """The sum is taken in float32, whatever the base's type."""
        bank.model.to(dtype)
        before = weights(bank.model)
        layer = bank.model.model.layers[0].self_attn.q_proj
        wanted = layer.weight.float()
        for name, weight in (("a", 0.7), ("b", 0.3)):
            a, b = (t.detach().float() for t in bank[name].pair("model.layers.0.self_attn.q_proj"))
            wanted = wanted + weight * bank[name].sites["model.layers.0.self_attn.q_proj"].scaling * (b @ a)
        bank.merge({"a": 0.7, "b": 0.3})
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, wanted.to(dtype))
        bank.unmerge()
        assert unchanged(bank.model, before)

    def test_tied_weights_part_and_meet_again(self, fill, ids):
        """An adapter of the head merges into the head, not into the embedding that shares its weight."""
        config = LlamaConfig(
            vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=True, initializer_range=0.3,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        bank = Bank(model)
        for target in ("lm_head", "embed_tokens"):
            fill(bank.add(target, LoraConfig(r=2, target_modules=[target])))
            base, wanted = logits(bank, ids), logits(bank, ids, target)
            bank.merge(target)
            assert model.lm_head.weight is not model.model.embed_tokens.weight
            assert torch.allclose(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
            bank.unmerge()
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert torch.equal(model(ids).logits, base)

    def test_a_checkpoint_of_the_merged_model_needs_no_adapter(self, bank, ids, tmp_path):
        wanted = logits(bank, ids, "a")
        bank.merge("a")
        bank.model.save_pretrained(tmp_path)
        alone = type(bank.model).from_pretrained(tmp_path)
        assert torch.allclose(alone(ids).logits, wanted, atol=1e-4, rtol=1e-4)

    def test_moved_while_merged(self, bank, ids):
        """The weights that are set aside move too."""
        base = logits(bank, ids)
        bank.merge({"a": 1.0, "b": 1.0})
        bank.model.double()
        bank.unmerge()
        assert {p.dtype for p in bank.model.parameters()} == {torch.float64}
        assert torch.equal(bank.model.float()(ids).logits, base)

    def test_a_copy_is_merged_by_itself(self, bank, ids):
        base = logits(bank, ids)
        bank.merge("a")
        twin = copy.deepcopy(bank)
        bank.unmerge()
        assert torch.equal(bank.model(ids).logits, base)
        assert not torch.equal(twin.model(ids).logits, base)
        twin.unmerge()
        assert torch.equal(twin.model(ids).logits, base)

    def test_training_flags_are_kept(self, bank):
        bank.model.lm_head.weight.requires_grad_(True)
        bank.merge({"a": 1.0, "b": 1.0})
        assert bank.model.lm_head.weight.requires_grad
        assert not bank.model.model.embed_tokens.weight.requires_grad


class TestRefusals:
    """What cannot be is refused, and nothing has changed."""

    def test_routes_while_merged(self, bank, ids):
        bank.merge("a")
        for use in (
            lambda: bank.route("a"),
            lambda: bank.route(["b", None]),
            lambda: bank.merge("b"),
            lambda: bank.add("c", LoraConfig()),
        ):
            with pytest.raises(RouteError, match="merged into the base"):
                use()
        assert bank.names() == ["a", "b"]
        bank.unmerge()
        bank.unmerge()  # once more does nothing
        bank.route("a")

    def test_merging_under_a_route(self, bank, ids):
        """Or the open route would add the adapter a second time."""
        before, wanted = weights(bank.model), logits(bank, ids, "a")
        with torch.no_grad(), bank.route("a"):
            with pytest.raises(RouteError, match="route"):
                bank.merge("a")
            assert torch.equal(bank.model(ids).logits, wanted)
        assert unchanged(bank.model, before)
        bank.merge("a")

    def test_none_while_merged_is_the_model_as_it_is(self, bank, ids):
        bank.merge("a")
        merged = bank.model(ids).logits
        for rows in (None, [None] * 4, {"a": 0.0}):
            assert torch.equal(logits(bank, ids, rows), merged)

    def test_what_is_no_entry(self, bank):
        before = weights(bank.model)
        with pytest.raises(UnknownAdapterError):
            bank.merge({"a": 1.0, "nobody": 1.0})
        for entry in (3, ["a", "b"], {"a": float("nan")}, {"a": "1"}):
            with pytest.raises(RouteError):
                bank.merge(entry)
        assert unchanged(bank.model, before)

    def test_nothing_to_merge(self, bank, ids):
        before = weights(bank.model)
        for entry in (None, {}, {"a": 0}):
            bank.merge(entry)
            assert unchanged(bank.model, before)
            bank.unmerge()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite(self, bank, bad):
        before = weights(bank.model)
        with torch.no_grad():
            [*bank.parameters("a")][-1][0, 0] = bad
        with pytest.raises(AdapterError, match="NaN or Inf"):
            bank.merge("a")
        assert unchanged(bank.model, before)
        bank.merge("b")

    def test_a_grouped_convolution(self, zoo, fill):
        bank = Bank(zoo)
        fill(bank.add("a", LoraConfig(r=2, target_modules=["linear", "grouped"])))
        before = weights(zoo)
        with pytest.raises(UnsupportedError, match=r"grouped: .*groups"):
            bank.merge("a")
        assert unchanged(zoo, before)

    def test_a_weight_that_is_no_plain_tensor(self, fill):
        class Packed(nn.Parameter):
            """A stand-in for a quantised weight."""

        model = nn.ModuleDict({"x": nn.Linear(4, 4)})
        model["x"].weight = Packed(torch.randn(4, 4))
        bank = Bank(model)
        fill(bank.add("a", LoraConfig(r=2, target_modules=["x"])))
        with pytest.raises(UnsupportedError, match="cannot merge into x: its weight is a Packed"):
            bank.merge("a")
        assert type(model["x"].weight) is Packed

    def test_a_merge_that_overflows(self, fill):
        bank = Bank(nn.Sequential(nn.Linear(4, 4)).half())
        fill(bank.add("a", LoraConfig(r=2, target_modules=["0"])), size=300.0)
        before = weights(bank.model)
        with pytest.raises(AdapterError, match="0 would hold NaN or Inf"):
            bank.merge("a")
        assert unchanged(bank.model, before)

    def test_a_quantised_weight(self, zoo, fill):
        bank = Bank(zoo)
        fill(bank.add("a", LoraConfig(r=2, target_modules=["mix", "linear"])))
        zoo.linear.weight = nn.Parameter(torch.ones(5, 7, dtype=torch.int8), requires_grad=False)
        before = weights(zoo)
        with pytest.raises(UnsupportedError, match=r"linear: its weight is a Parameter of torch\.int8"):
            bank.merge("a")
        assert unchanged(zoo, before)

    def test_unloading_what_is_merged(self, bank, ids):
        base = logits(bank, ids)
        bank.merge("a")
        merged = bank.model(ids).logits
        bank.unload("a")
        assert torch.equal(bank.model(ids).logits, merged)
        bank.unmerge()
        assert torch.equal(bank.model(ids).logits, base)
        bank.detach()
        assert torch.equal(bank.model(ids).logits, base)

    def test_loading_while_merged(self, bank, ids, tmp_path):
        bank.save("b", tmp_path / "c")
        base, wanted = logits(bank, ids), logits(bank, ids, "b")
        bank.merge("a")
        try:
            bank.load(tmp_path / "c")
        except LoradeckError:
            assert bank.names() == ["a", "b"]
            bank.unmerge()
            bank.load(tmp_path / "c")
        bank.unmerge()
        assert torch.equal(logits(bank, ids), base)
        assert torch.allclose(logits(bank, ids, "c"), wanted, atol=1e-5)
