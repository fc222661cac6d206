"""Several adapters into one: each method against its dense definition, and against PEFT's own."""

import copy
import math

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loradeck import Adapter, Bank, LoraConfig
from loradeck.errors import AdapterError, AdapterNameError, ConfigError, UnknownAdapterError
from loradeck.lora.combine import combine

PLAIN = ("embed", "conv1", "conv2", "mix", "linear")  # of the zoo: every kind but the grouped convolution
PEFTS_OWN = "ignore:.*is_gradient_checkpointing:FutureWarning"
WEIGHTS = {"a": 0.7, "b": -1.3, "c": 0.4}


def delta(adapter, path):
    """The update as one matrix (out, in · kernel)."""
    a, b = adapter.pair(path)
    return (adapter.sites[path].scaling * b.flatten(1) @ a.flatten(1)).detach()


def dense_sum(bank, weights, path):
    return sum(w * delta(bank[name], path) for name, w in weights.items() if path in bank[name].sites)


def truncated(dense, r):
    u, s, v = torch.linalg.svd(dense.double(), full_matrices=False)
    return ((u[:, :r] * s[:r]) @ v[:r]).float()


def relative_error(pairs):
    """‖D - D'‖ / ‖D‖ over all modules, for (D, D') of each."""
    pairs = [(wanted.double(), got.double()) for wanted, got in pairs]
    lost = sum((wanted - got).square().sum() for wanted, got in pairs)
    return math.sqrt(lost / sum(wanted.square().sum() for wanted, _ in pairs))


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture
def bank(zoo, fill):
    """Three adapters on the zoo that differ in rank, scaling (one rsLoRA) and modules."""
    bank = Bank(zoo)
    fill(bank.add("a", LoraConfig(r=2, lora_alpha=6, target_modules=PLAIN)), seed=1)
    fill(bank.add("b", LoraConfig(r=3, lora_alpha=4, use_rslora=True, target_modules=PLAIN)), seed=2)
    fill(bank.add("c", LoraConfig(r=2, lora_alpha=2, target_modules=("linear", "conv1"))), seed=3)
    return bank


@pytest.fixture
def zoo_ids():
    return torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(3))


def logits(bank, ids, route):
    with torch.no_grad(), bank.route(route):
        return bank.model(ids)


class TestConcat:
    """The sum itself, at the sum of the ranks."""

    def test_is_the_sum(self, bank):
        made = bank.combine(WEIGHTS, name="sum")
        assert made.error == 0
        assert made.adapter is bank["sum"]
        assert bank.names() == ["a", "b", "c", "sum"]
        for path in PLAIN:
            close(delta(made.adapter, path), dense_sum(bank, WEIGHTS, path))
        assert {path: site.r for path, site in made.adapter.sites.items()} == {
            path: 7 if path in ("linear", "conv1") else 5 for path in PLAIN
        }

    def test_routes_as_the_blend(self, bank, zoo_ids):
        bank.combine(WEIGHTS, name="sum")
        wanted = logits(bank, zoo_ids, WEIGHTS)
        assert (wanted - logits(bank, zoo_ids, None)).abs().max() > 0.1
        close(logits(bank, zoo_ids, "sum"), wanted)

    def test_sources_are_untouched(self, bank):
        before = [bank[name].content_hash() for name in "abc"]
        made = bank.combine({"a": 1.0}, name="copy").adapter
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
        assert [bank[name].content_hash() for name in "abc"] == before

    def test_one_of_each(self, bank, fill):
        """Modules that only one adapter has."""
        fill(bank.add("d", LoraConfig(r=1, target_modules=["linear"])), seed=4)
        fill(bank.add("e", LoraConfig(r=4, target_modules=["mix"])), seed=5)
        made = bank.combine({"d": 2.0, "e": -0.5}, name="both").adapter
        assert {path: site.r for path, site in made.sites.items()} == {"linear": 1, "mix": 4}
        close(delta(made, "linear"), 2.0 * delta(bank["d"], "linear"))
        close(delta(made, "mix"), -0.5 * delta(bank["e"], "mix"))

    def test_weights_that_cancel(self, bank, zoo_ids, fill):
        bank.add("twin", bank["a"])
        bank.combine({"a": 1.0, "twin": -1.0}, name="none")
        close(logits(bank, zoo_ids, "none"), logits(bank, zoo_ids, None))

    def test_of_narrow_adapters(self, bank):
        """Worked out in float32, rounded once."""
        for name in "ab":
            bank[name].to(torch.bfloat16)
        made = bank.combine({"a": 0.7, "b": 0.3}, name="sum").adapter
        for path in PLAIN:
            assert {tensor.dtype for tensor in made.pair(path)} == {torch.bfloat16}
            for half, scaled in ((0, False), (1, True)):
                dim = half
                parts = [bank[n].pair(path)[half].float() for n in "ab"]
                if scaled:
                    parts = [
                        w * bank[n].sites[path].scaling * p
                        for (n, w), p in zip((("a", 0.7), ("b", 0.3)), parts, strict=True)
                    ]
                assert torch.equal(made.pair(path)[half], torch.cat(parts, dim).bfloat16())


class TestSvd:
    """The best approximation of a rank, from the factors."""

    @pytest.mark.parametrize("r", [1, 2, 4])
    def test_is_the_truncated_svd_of_the_sum(self, bank, r):
        made = bank.combine(WEIGHTS, name="svd", method="svd", r=r)
        pairs = []
        for path in PLAIN:
            dense, got = dense_sum(bank, WEIGHTS, path), delta(made.adapter, path)
            assert made.adapter.sites[path].r == r
            assert made.adapter.sites[path].scaling == 1
            close(got, truncated(dense, r), 2e-5)
            pairs.append((dense, got))
        assert made.error == pytest.approx(relative_error(pairs), rel=1e-4)
        assert made.error > 0.01

    def test_by_default_the_largest_rank(self, bank):
        made = bank.combine(WEIGHTS, name="svd", method="svd").adapter
        assert {site.r for site in made.sites.values()} == {3}

    @pytest.mark.parametrize("r", [7, 40])
    def test_at_full_rank_nothing_is_lost(self, bank, r):
        """40 is more than any of these matrices can have: the rest is zero."""
        made = bank.combine(WEIGHTS, name="svd", method="svd", r=r)
        assert made.error < 1e-5
        for path in PLAIN:
            a, b = made.adapter.pair(path)
            assert (a.shape[0], b.shape[1]) == (r, r)
            close(delta(made.adapter, path), dense_sum(bank, WEIGHTS, path), 2e-5)

    def test_of_nothing(self, bank):
        made = bank.combine({"a": 0.0}, name="svd", method="svd")
        assert made.error == 0
        assert all(not delta(made.adapter, path).any() for path in PLAIN)

    @pytest.mark.parametrize("method", ["svd", "concat"])
    def test_builds_no_dense_product(self, fill, method):
        largest = 0

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                for one in out if isinstance(out, tuple | list) else [out]:
                    if isinstance(one, torch.Tensor):
                        largest = max(largest, one.numel())
                return out

        bank = Bank(nn.Sequential(nn.Linear(200, 300)))
        for name in "ab":
            fill(bank.add(name, LoraConfig(r=4)), seed=ord(name))
        with Sizes():
            made = combine([(bank["a"], 0.5), (bank["b"], 0.5)], method=method)
        assert 0 < largest <= 300 * 8
        if method == "svd":
            dense = dense_sum(bank, {"a": 0.5, "b": 0.5}, "0")
            assert made.error == pytest.approx(relative_error([(dense, delta(made.adapter, "0"))]), rel=1e-4)


def ties(updates, density):
    """TIES by its definition, value by value."""
    rows = []
    for update in updates:
        flat = update.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))
        kept = set(order[: max(1, round(density * len(flat)))])
        rows.append([value if i in kept else 0.0 for i, value in enumerate(flat)])
    out = []
    for values in zip(*rows, strict=True):
        elected = sum(values)
        agree = [value for value in values if value * elected > 0]
        out.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(out).view(updates[0].shape)


FULL = 40  # a rank at which the svd after ties and dare loses nothing


class TestTies:
    """Trim, elect, average."""

    @pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
    def test_is_its_definition(self, bank, density):
        made = bank.combine(WEIGHTS, name="ties", method="ties", r=FULL, density=density)
        assert made.error < 1e-5
        for path in PLAIN:
            own = [w * delta(bank[n], path) for n, w in WEIGHTS.items() if path in bank[n].sites]
            close(delta(made.adapter, path), ties(own, density), 2e-5)

    def test_then_the_best_rank(self, bank):
        made = bank.combine(WEIGHTS, name="ties", method="ties", r=2, density=0.4)
        pairs = []
        for path in PLAIN:
            dense = ties([w * delta(bank[n], path) for n, w in WEIGHTS.items() if path in bank[n].sites], 0.4)
            close(delta(made.adapter, path), truncated(dense, 2), 5e-5)
            pairs.append((dense, delta(made.adapter, path)))
        assert made.error == pytest.approx(relative_error(pairs), rel=1e-4)

    def test_one_adapter_at_density_one_is_itself(self, bank):
        made = bank.combine({"b": 1.0}, name="ties", method="ties", density=1.0)
        assert made.error < 1e-5
        for path in PLAIN:
            close(delta(made.adapter, path), delta(bank["b"], path), 2e-5)


class TestDare:
    """Drop, rescale, sum."""

    @pytest.mark.parametrize("density", [0.3, 0.8])
    def test_is_its_definition(self, bank, density):
        made = bank.combine(WEIGHTS, name="dare", method="dare", r=FULL, density=density, seed=7)
        generator = torch.Generator().manual_seed(7)
        for path in made.adapter.sites:
            wanted = 0
            for name, weight in WEIGHTS.items():
                if path in bank[name].sites:
                    update = weight * delta(bank[name], path)
                    wanted = (
                        wanted + update * torch.empty_like(update).bernoulli_(density, generator=generator) / density
                    )
            close(delta(made.adapter, path), wanted, 5e-5)

    def test_a_seed_is_a_choice(self, bank):
        for name, seed in (("one", 1), ("same", 1), ("two", 2)):
            bank.combine(WEIGHTS, name=name, method="dare", seed=seed)
        assert bank["one"].content_hash() == bank["same"].content_hash() != bank["two"].content_hash()

    def test_leaves_the_global_generator_alone(self, bank):
        before = torch.get_rng_state()
        bank.combine(WEIGHTS, name="dare", method="dare")
        assert torch.equal(torch.get_rng_state(), before)

    def test_at_density_one_is_the_sum(self, bank):
        made = bank.combine(WEIGHTS, name="dare", method="dare", r=FULL, density=1.0)
        for path in PLAIN:
            close(delta(made.adapter, path), dense_sum(bank, WEIGHTS, path), 2e-5)


class TestRefused:
    """What cannot be is one error, and the bank is as it was."""

    @pytest.mark.parametrize(
        ("weights", "how", "match"),
        [
            ({}, {}, "nothing to combine"),
            ({"a": 1.0}, {"method": "mean"}, "'mean' is unknown"),
            ({"a": 1.0}, {"r": 4}, "concat keeps every rank"),
            ({"a": 1.0}, {"method": "svd", "r": 0}, "r is 0"),
            ({"a": 1.0}, {"method": "svd", "r": -1}, "r is -1"),
            ({"a": 1.0}, {"method": "svd", "r": 65_537}, "r is 65537"),
            ({"a": 1.0}, {"method": "svd", "r": 2.5}, "r is 2.5"),
            ({"a": 1.0}, {"method": "svd", "r": True}, "r is True"),
            ({"a": 1.0}, {"method": "ties", "density": 0.0}, "density is 0"),
            ({"a": 1.0}, {"method": "ties", "density": 1.1}, "density is 1.1"),
            ({"a": 1.0}, {"method": "dare", "density": -0.1}, "density is -0.1"),
            ({"a": 1.0}, {"method": "dare", "density": math.nan}, "density is nan"),
            ({"a": math.nan}, {}, "nan"),
            ({"a": 1.0, "b": math.inf}, {"method": "svd"}, "inf"),
            ({"a": 1.0, "grouped": 1.0}, {}, "grouped is a grouped convolution"),
            ({"grouped": 1.0}, {"method": "svd"}, "grouped is a grouped convolution"),
        ],
    )
    def test_what_cannot_be(self, bank, fill, weights, how, match):
        fill(bank.add("grouped", LoraConfig(r=2, target_modules=["grouped", "linear"])))
        before = [bank[name].content_hash() for name in bank.names()]
        with pytest.raises(ConfigError, match=match):
            bank.combine(weights, name="new", **how)
        assert bank.names() == ["a", "b", "c", "grouped"]
        assert [bank[name].content_hash() for name in bank.names()] == before

    @pytest.mark.parametrize("method", ["concat", "svd", "ties", "dare"])
    def test_an_adapter_that_is_broken(self, bank, method):
        with torch.no_grad():
            bank["b"].pair("mix")[0][0, 0] = math.nan
        with pytest.raises(AdapterError, match=r"mix\.lora_A\.weight holds NaN"):
            bank.combine(WEIGHTS, name="new", method=method)
        assert bank.names() == ["a", "b", "c"]

    def test_names(self, bank):
        with pytest.raises(UnknownAdapterError):
            bank.combine({"a": 1.0, "z": 1.0}, name="new")
        with pytest.raises(AdapterNameError):
            bank.combine({"a": 1.0}, name="b")
        assert bank.names() == ["a", "b", "c"]

    def test_adapters_of_two_bases(self):
        one = Adapter.of(LoraConfig(r=2), {"x": (torch.ones(2, 5), torch.ones(4, 2))})
        other = Adapter.of(LoraConfig(r=2), {"x": (torch.ones(2, 6), torch.ones(4, 2))})
        with pytest.raises(ConfigError, match="x has other shapes in another adapter"):
            combine([(one, 1.0), (other, 1.0)])


class TestPeft:
    """PEFT's add_weighted_adapter, and PEFT as a reader of what was combined."""

    def both(self, tiny, fill):
        """Our bank and PEFT's model with the same two adapters, "one" (r=4) and "two" (r=2)."""
        theirs, bank = copy.deepcopy(tiny), Bank(tiny)
        for name, r in (("one", 4), ("two", 2)):
            fill(bank.add(name, LoraConfig(r=r, lora_alpha=3, target_modules=["q_proj", "down_proj"])), seed=r)
        model = None
        for name in ("one", "two"):
            config = PeftConfig(r=bank[name].config.r, lora_alpha=3, target_modules=["q_proj", "down_proj"])
            if model is None:
                model = get_peft_model(theirs, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            for path in bank[name].sites:
                module, (a, b) = model.base_model.model.get_submodule(path), bank[name].pair(path)
                with torch.no_grad():
                    module.lora_A[name].weight.copy_(a)
                    module.lora_B[name].weight.copy_(b)
        return bank, model

    @pytest.mark.filterwarnings(PEFTS_OWN)
    @pytest.mark.parametrize(("ours", "theirs", "rank"), [("concat", "cat", {}), ("svd", "svd", {"r": 3})])
    def test_the_same_as_theirs(self, tiny, fill, ours, theirs, rank):
        bank, model = self.both(tiny, fill)
        made = bank.combine({"one": 0.6, "two": 1.7}, name="new", method=ours, **rank)
        svd = {"svd_rank": rank["r"]} if rank else {}
        model.add_weighted_adapter(["one", "two"], [0.6, 1.7], "new", combination_type=theirs, **svd)
        for path in made.adapter.sites:
            module = model.base_model.model.get_submodule(path)
            assert module.r["new"] == made.adapter.sites[path].r
            close(delta(made.adapter, path), module.get_delta_weight("new").detach(), 2e-5)

    @pytest.mark.filterwarnings(PEFTS_OWN)
    @pytest.mark.parametrize("method", ["concat", "svd", "ties", "dare"])
    def test_saved_it_is_the_same_anywhere(self, tiny, fill, ids, method, tmp_path):
        theirs, other, bank = copy.deepcopy(tiny), copy.deepcopy(tiny), Bank(tiny)
        fill(bank.add("a", LoraConfig(r=4, target_modules=["q_proj", "down_proj"])), seed=1, size=0.1)
        own = LoraConfig(r=2, use_rslora=True, target_modules=["v_proj", "embed_tokens", "down_proj"])
        fill(bank.add("b", own), seed=2, size=0.1)
        made = bank.combine({"a": 0.6, "b": -0.7}, name="new", method=method)
        with torch.no_grad():
            with bank.route("new"):
                wanted = tiny(ids).logits
            assert (wanted - tiny(ids).logits).abs().max() > 0.1
            bank.save("new", tmp_path / "new")
            again = Bank(other)
            again.load(tmp_path / "new")
            assert again["new"].content_hash() == made.adapter.content_hash()
            with again.route("new"):
                assert torch.equal(other(ids).logits, wanted)
            model = PeftModel.from_pretrained(theirs, tmp_path / "new").eval()
            close(model(ids).logits, wanted)
