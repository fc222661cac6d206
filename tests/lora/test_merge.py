"""Adapters folded into the base and taken out again: the same logits while merged, the very same base after."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loradeck import Bank, LoraConfig
from loradeck.errors import AdapterError, RouteError, UnsupportedError

PLAIN = ("embed", "conv1", "conv2", "mix", "linear")  # of the zoo: every kind but the grouped convolution


@pytest.fixture
def zoo_ids():
    return torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def bank(zoo, fill):
    """One adapter on each plain kind of layer, "all" on all of them, and "other"."""
    bank = Bank(zoo)
    for seed, path in enumerate(PLAIN):
        fill(bank.add(path, LoraConfig(r=2, lora_alpha=6, target_modules=[path])), seed=seed)
    fill(bank.add("all", LoraConfig(r=3, use_rslora=True, target_modules=PLAIN)), seed=8)
    fill(bank.add("other", LoraConfig(r=1, target_modules=("linear", "embed"))), seed=9)
    return bank


def routed(bank, ids, route):
    with torch.no_grad(), bank.route(route):
        return bank.model(ids)


def state(model):
    """Every parameter of the base: the object, its values, and where it lies."""
    return {
        name: (id(p), p.data_ptr(), p.requires_grad, p.detach().clone())
        for name, p in model.named_parameters(remove_duplicate=False)
        if not name.startswith("loradeck.")
    }


def check_same(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    for name, (*rest, values) in before.items():
        assert after[name][:-1] == tuple(rest), name
        assert torch.equal(after[name][-1].view(torch.uint8), values.view(torch.uint8)), name


class TestMerged:
    """The merged base computes what the route did."""

    @pytest.mark.parametrize(
        "entry", [*PLAIN, "all", {"all": 0.5}, {"all": -0.7, "other": 1.2, "mix": 0.4}, {"all": 0.0}], ids=str
    )
    def test_merged_is_routed(self, bank, zoo_ids, entry):
        base, before = routed(bank, zoo_ids, None), state(bank.model)
        wanted = routed(bank, zoo_ids, entry)
        bank.merge(entry)
        with torch.no_grad():
            torch.testing.assert_close(bank.model(zoo_ids), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(wanted, base) == (entry == {"all": 0.0})
        bank.unmerge()
        check_same(bank.model, before)
        assert torch.equal(routed(bank, zoo_ids, None), base)
        assert torch.equal(routed(bank, zoo_ids, entry), wanted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_unmerge_is_bit_for_bit(self, tiny, fill, ids, dtype):
        bank = Bank(tiny.to(dtype))
        fill(bank.add("a", LoraConfig(r=4)))
        before, base = state(tiny), routed(bank, ids, None).logits
        for _ in range(3):
            bank.merge("a")
            assert {p.dtype for p in tiny.parameters() if not p.requires_grad} == {dtype}
            assert not torch.equal(
                tiny.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"][-1]
            )
            bank.unmerge()
            check_same(tiny, before)
        assert torch.equal(routed(bank, ids, None).logits, base)

    def test_a_narrow_weight_is_rounded_once(self, fill):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6)).to(torch.bfloat16)
        bank, weight = Bank(model), model[0].weight.detach().clone()
        for seed, name in enumerate("ab"):
            fill(bank.add(name, LoraConfig(r=2, lora_alpha=2)), seed=seed, size=0.05)
        (a1, b1), (a2, b2) = bank["a"].pair("0"), bank["b"].pair("0")
        bank.merge({"a": 0.5, "b": 0.25})
        assert torch.equal(model[0].weight, (weight.float() + 0.5 * (b1 @ a1) + 0.25 * (b2 @ a2)).bfloat16())

    def test_unmerge_without_a_merge_does_nothing(self, bank):
        before = state(bank.model)
        bank.unmerge()
        check_same(bank.model, before)

    def test_detach_while_merged_restores_the_base(self, zoo, bank, zoo_ids):
        wanted, before = routed(bank, zoo_ids, None), state(zoo)
        bank.merge("all")
        bank.detach()
        check_same(zoo, before)
        assert not hasattr(zoo, "loradeck")
        with torch.no_grad():
            assert torch.equal(zoo(zoo_ids), wanted)
        assert Bank(zoo).names() == []

    def test_a_merged_weight_keeps_requires_grad(self, zoo, fill):
        zoo.linear.weight.requires_grad_(True)
        bank = Bank(zoo)
        fill(bank.add("a", LoraConfig(r=2, target_modules=["linear", "mix"])))
        bank.merge("a")
        assert zoo.linear.weight.requires_grad
        assert not zoo.mix.weight.requires_grad
        assert zoo.linear.weight.is_leaf

    def test_saved_while_merged_is_the_merged_model(self, tiny, fill, ids, tmp_path):
        bank = Bank(tiny)
        fill(bank.add("a", LoraConfig(r=4)))
        wanted = routed(bank, ids, "a").logits
        bank.merge("a")
        tiny.save_pretrained(tmp_path / "merged")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-4, atol=1e-4)


class TestTied:
    """An adapter on the embedding of a model whose head shares its weight is not one on the head."""

    def test_the_head_stays(self, fill, ids):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        bank, before, head = Bank(model), state(model), model.lm_head.weight
        fill(bank.add("a", LoraConfig(r=4, target_modules=["embed_tokens"])))
        wanted = routed(bank, ids, "a").logits
        bank.merge("a")
        assert model.lm_head.weight is head
        assert torch.equal(head, before["lm_head.weight"][-1])
        assert not torch.equal(model.model.embed_tokens.weight, head)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        bank.unmerge()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        check_same(model, before)


class TestWhileMerged:
    """What is merged cannot be routed too, and adapters come and go as ever."""

    @pytest.mark.parametrize("route", ["all", "other", {"all": 0.5}, ["all", None, None, None]], ids=str)
    def test_no_route(self, bank, zoo_ids, route):
        bank.merge("all")
        with torch.no_grad():
            merged = bank.model(zoo_ids)
        with pytest.raises(RouteError, match=r"merged into the base(.|\n)*unmerge"), bank.route(route):
            pass
        with torch.no_grad():
            assert torch.equal(bank.model(zoo_ids), merged)
        bank.unmerge()
        routed(bank, zoo_ids, route)

    def test_no_merge_in_an_open_route(self, bank, zoo_ids):
        """It would count twice."""
        before = state(bank.model)
        with bank.route("all"), pytest.raises(RouteError):
            bank.merge("all")
        check_same(bank.model, before)
        bank.merge("all")

    @pytest.mark.parametrize("entry", ["all", "other", {"other": 0.5}], ids=str)
    def test_merged_once(self, bank, zoo_ids, entry):
        before = state(bank.model)
        bank.merge("all")
        merged = state(bank.model)
        with pytest.raises(RouteError, match="merged into the base"):
            bank.merge(entry)
        check_same(bank.model, merged)
        bank.unmerge()
        check_same(bank.model, before)

    def test_a_fresh_adapter_has_to_wait(self, bank):
        bank.merge("all")
        names = bank.names()
        with pytest.raises(RouteError, match="merged into the base"):
            bank.add("new", LoraConfig(r=2, target_modules=["linear"]))
        assert bank.names() == names
        bank.unmerge()
        bank.add("new", LoraConfig(r=2, target_modules=["linear"]))

    def test_a_loaded_one_comes_and_changes_nothing(self, bank, zoo_ids, tmp_path):
        before, wanted = state(bank.model), routed(bank, zoo_ids, "other")
        bank.save("other", tmp_path / "again")
        for name in bank.names():
            if name != "linear":
                bank.unload(name)
        bank.merge("linear")  # the only one left, so that `embed` is adapted anew
        with torch.no_grad():
            merged = bank.model(zoo_ids)
            bank.load(tmp_path / "again")
            assert torch.equal(bank.model(zoo_ids), merged)
        bank.unmerge()
        check_same(bank.model, before)
        assert torch.equal(routed(bank, zoo_ids, "again"), wanted)

    def test_the_merged_one_goes_and_stays_merged(self, bank, zoo_ids):
        before = state(bank.model)
        bank.merge("all")
        with torch.no_grad():
            merged = bank.model(zoo_ids)
            for name in bank.names():
                bank.unload(name)
            assert torch.equal(bank.model(zoo_ids), merged)
        with pytest.raises(RouteError, match="merged into the base"):
            bank.add("new", LoraConfig(r=2, target_modules=["linear"]))
        bank.unmerge()
        check_same(bank.model, before)

    def test_a_copy_is_merged_by_itself(self, bank, zoo_ids):
        before = routed(bank, zoo_ids, None)
        bank.merge("all")
        twin = copy.deepcopy(bank.model)
        bank.unmerge()
        with torch.no_grad():
            assert torch.equal(bank.model(zoo_ids), before)
            assert not torch.equal(twin(zoo_ids), before)


class TestRefused:
    """What cannot be merged changes nothing, not even the modules before it."""

    def check(self, bank, entry, error, match):
        before = state(bank.model)
        with pytest.raises(error, match=match):
            bank.merge(entry)
        check_same(bank.model, before)
        with bank.route("linear"):  # not merged
            pass

    def test_a_grouped_convolution(self, bank, zoo_ids, fill):
        fill(bank.add("grouped", LoraConfig(r=2, target_modules=["linear", "grouped", "embed"])))
        self.check(bank, "grouped", UnsupportedError, "grouped: .*grouped convolution")
        self.check(bank, {"all": 1.0, "grouped": 0.5}, UnsupportedError, "grouped: .*grouped convolution")
        bank.merge("all")

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_an_adapter_that_is_broken(self, bank, bad):
        with torch.no_grad():
            bank["all"].pair("linear")[1][0, 0] = bad
        self.check(bank, "all", AdapterError, "linear would hold NaN or Inf")
        self.check(bank, {"other": 1.0, "all": 0.1}, AdapterError, "linear would hold NaN or Inf")
        bank.merge("other")

    def test_a_merge_that_overflows(self, fill):
        model = nn.Sequential(nn.Linear(4, 4)).to(torch.float16)
        bank = Bank(model)
        fill(bank.add("linear", LoraConfig(r=2)), size=300.0)
        self.check(bank, "linear", AdapterError, "0 would hold NaN or Inf")

    def test_a_quantised_weight(self, zoo, bank):
        zoo.linear.weight = nn.Parameter(torch.ones(5, 7, dtype=torch.int8), requires_grad=False)
        self.check(bank, "all", UnsupportedError, r"linear has a Parameter of torch\.int8")
        bank.merge("mix")

    def test_a_weight_of_another_type(self, zoo, bank):
        class Packed(nn.Parameter):
            pass

        zoo.linear.weight = Packed(zoo.linear.weight.data, requires_grad=False)
        self.check(bank, "all", UnsupportedError, r"linear has a Packed of torch\.float32")
