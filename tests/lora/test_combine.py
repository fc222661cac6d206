"""Several adapters into one: each method against its plain dense definition, and against PEFT."""

import math

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from tests.digest import digest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loradeck import Adapter, Bank, LoraConfig
from loradeck.errors import AdapterNameError, ConfigError, LoradeckError, UnknownAdapterError
from loradeck.lora.combine import METHODS, combine

# PEFT 0.21 asks transformers 5 by a name that is going away.
# Its config has one fan_in_fan_out for all layers, and it says so where a model has both kinds.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

PATHS = ["embed", "conv1", "conv2", "mix", "linear"]
CONFIGS = {
    "a": LoraConfig(r=4, lora_alpha=8, target_modules=PATHS),
    "b": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["linear", "embed", "conv2"]),
    "c": LoraConfig(
        r=2, rank_pattern={"mix": 6}, alpha_pattern={"mix": 1.5}, target_modules=["mix", "linear", "conv1"]
    ),
}
BLEND = {"a": 0.7, "b": -0.4, "c": 1.3}


@pytest.fixture
def bank(zoo, fill):
    bank = Bank(zoo)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        fill(bank.add(name, config), seed=seed)
    return bank


def dense(adapter: Adapter, path: str) -> Tensor:
    """scaling · B A as a matrix (out, everything else), in float64."""
    if path not in adapter.sites:
        return torch.zeros(())
    a, b = (t.detach().double().flatten(1) for t in adapter.pair(path))
    return adapter.sites[path].scaling * b @ a


def truncated(matrix: Tensor, r: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :r] * s[:r] @ v[:r]


def outputs(bank, route):
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), bank.route(route):
        return bank.model(ids)


class TestConcat:
    """Exact, at the sum of the ranks."""

    @pytest.mark.parametrize("weights", [BLEND, {"a": 1.0}, {"b": 0.5, "c": 0.5}, {"a": 2, "b": 0}], ids=str)
    def test_it_is_the_blend(self, bank, weights):
        result = bank.combine(weights, name="all")
        assert result.error == 0.0
        assert bank.names() == ["a", "b", "c", "all"]
        assert result.adapter is bank["all"]
        assert torch.allclose(outputs(bank, "all"), outputs(bank, weights), atol=1e-5)
        for path in {path for name in weights for path in bank[name].sites}:
            wanted = sum(weight * dense(bank[name], path) for name, weight in weights.items())
            assert torch.allclose(dense(bank["all"], path), wanted, atol=1e-6)
            assert bank["all"].sites[path].r == sum(
                bank[name].sites[path].r for name in weights if path in bank[name].sites
            )

    def test_it_takes_no_rank(self, bank):
        with pytest.raises(ConfigError, match="takes no r"):
            bank.combine({"a": 1.0}, name="x", r=4)

    def test_modules_that_only_one_of_them_has(self, bank, fill):
        fill(bank.add("d", LoraConfig(r=1, target_modules=["linear"])), seed=4)
        fill(bank.add("e", LoraConfig(r=4, target_modules=["mix"])), seed=5)
        made = bank.combine({"d": 2.0, "e": -0.5}, name="both").adapter
        assert {path: site.r for path, site in made.sites.items()} == {"linear": 1, "mix": 4}
        assert torch.allclose(dense(made, "linear"), 2 * dense(bank["d"], "linear"), atol=1e-6)
        assert torch.allclose(dense(made, "mix"), -0.5 * dense(bank["e"], "mix"), atol=1e-6)

    def test_its_sources_are_untouched(self, bank):
        before = [digest(bank[name]) for name in "abc"]
        state = torch.get_rng_state()
        for method in METHODS:
            made = bank.combine({"a": 1.0}, name=method, method=method).adapter
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.zero_()
        assert [digest(bank[name]) for name in "abc"] == before
        assert torch.equal(torch.get_rng_state(), state)

    def test_weights_that_cancel(self, bank):
        bank.add("twin", bank["a"])
        bank.combine({"a": 1.0, "twin": -1.0}, name="none")
        assert torch.allclose(outputs(bank, "none"), outputs(bank, None), atol=1e-5)

    def test_the_adapters_it_came_from_may_go(self, bank):
        wanted = outputs(bank, BLEND)
        bank.combine(BLEND, name="all")
        for name in "abc":
            bank.unload(name)
        assert torch.allclose(outputs(bank, "all"), wanted, atol=1e-5)


class TestLowerRanks:
    """svd, ties and dare, against their definitions on whole matrices."""

    def check(self, bank, result, targets: dict[str, Tensor], r: int | None):
        lost = whole = 0.0
        for path, target in targets.items():
            ranks = [bank[name].sites[path].r for name in BLEND if path in bank[name].sites]
            rank = r or max(ranks)
            got, best = dense(result.adapter, path), truncated(target, rank)
            assert result.adapter.sites[path].r == rank
            assert torch.allclose(got, best, atol=1e-5 * target.abs().max().item())
            lost += (target - best).square().sum().item()
            whole += target.square().sum().item()
        assert result.error == pytest.approx(math.sqrt(lost / whole), abs=1e-5)

    @pytest.mark.parametrize("r", [None, 1, 3, 9, 40])
    def test_svd_is_the_truncated_sum(self, bank, r):
        result = bank.combine(BLEND, name="svd", method="svd", r=r)
        targets = {path: sum(weight * dense(bank[name], path) for name, weight in BLEND.items()) for path in PATHS}
        self.check(bank, result, targets, r)
        assert (result.error < 1e-5) == (r in (9, 40))

    @pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
    def test_ties(self, bank, density):
        result = bank.combine(BLEND, name="ties", method="ties", r=3, density=density)
        targets = {}
        for path in PATHS:
            trimmed = []
            for name, weight in BLEND.items():
                if path in bank[name].sites:
                    update = weight * dense(bank[name], path)
                    kept = update.abs().flatten().topk(max(1, round(density * update.numel()))).values.min()
                    trimmed.append(torch.where(update.abs() >= kept, update, 0))
            stack = torch.stack(trimmed)
            elected = stack.sum(0).sign()
            total = torch.zeros_like(elected)
            count = torch.zeros_like(elected)
            for update in trimmed:
                agrees = (update.sign() == elected) & (update != 0)
                total, count = total + torch.where(agrees, update, 0), count + agrees
            targets[path] = torch.where(count > 0, total / count.clamp(min=1), 0)
        self.check(bank, result, targets, 3)

    def test_dare_at_full_density_is_the_sum(self, bank):
        result = bank.combine(BLEND, name="dare", method="dare", r=20, density=1.0)
        targets = {path: sum(weight * dense(bank[name], path) for name, weight in BLEND.items()) for path in PATHS}
        self.check(bank, result, targets, 20)

    def test_dare_drops_and_rescales(self):
        """Over a matrix large enough to count: the share that is kept, its scale, its seed."""
        a, b = torch.randn(80, 60).sign(), torch.eye(80)
        adapter = Adapter.of(LoraConfig(r=80, lora_alpha=80), {"x": (a, b)})
        kept = {}
        for seed in (0, 0, 1):
            result = combine([(adapter, 2.0)], method="dare", density=0.25, r=80, seed=seed).adapter
            ratio = dense(result, "x") / (2 * a.double())
            mask = ratio > 2
            assert torch.allclose(ratio, 4.0 * mask.double(), atol=1e-3)
            assert 0.22 < mask.double().mean().item() < 0.28
            kept.setdefault(seed, []).append(mask)
        assert torch.equal(*kept[0])
        assert not torch.equal(kept[0][0], kept[1][0])

    def test_two_adapters_are_dropped_apart(self):
        adapter = Adapter.of(LoraConfig(r=30, lora_alpha=30), {"x": (torch.ones(30, 30), torch.eye(30))})
        result = combine([(adapter, 1.0), (adapter, 1.0)], method="dare", density=0.5, r=30).adapter
        values = dense(result, "x").round().unique().tolist()
        assert values == [0.0, 2.0, 4.0]

    @pytest.mark.parametrize("method", ["svd", "concat"])
    def test_these_never_make_the_dense_product(self, method):
        largest = 0

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                tensors = [one for one in (out if isinstance(out, tuple | list) else [out]) if isinstance(one, Tensor)]
                largest = max(largest, *(one.numel() for one in tensors), 0)
                return out

        adapter = Adapter.of(LoraConfig(r=4), {"x": (torch.randn(4, 200), torch.randn(300, 4))})
        with Sizes():
            combine([(adapter, 1.0), (adapter, 0.5)], method=method)
        assert 300 * 4 <= largest <= 300 * 8

    def test_error_of_nothing(self):
        adapter = Adapter.of(LoraConfig(r=2), {"x": (torch.zeros(2, 4), torch.zeros(3, 2))})
        for method in METHODS:
            result = combine([(adapter, 1.0)], method=method)
            assert result.error == 0.0
            assert not bool(dense(result.adapter, "x").any())


class TestPeft:
    """PEFT combines alike, and reads what comes out."""

    @pytest.fixture
    def folders(self, bank, tmp_path):
        """The adapters without rsLoRA, which PEFT 0.21 scales wrongly here (its issue 3449)."""
        for name in ("a", "c"):
            bank.save(name, tmp_path / name)
        return {name: tmp_path / name for name in ("a", "c")}

    @pytest.mark.parametrize(("method", "theirs"), [("concat", "cat"), ("svd", "svd")])
    def test_add_weighted_adapter(self, bank, folders, method, theirs):
        if method == "svd":  # of a convolution, PEFT's own svd fails
            for name in ("a", "c"):
                adapter = bank[name]
                pairs = {path: adapter.pair(path) for path in adapter.sites if not path.startswith("conv")}
                bank.unload(name)
                bank.add(name, Adapter.of(CONFIGS[name], {k: v for k, v in pairs.items() if k != "embed"}))
                bank.save(name, folders[name])
        weights = {"a": 0.6, "c": 0.9}
        options = {} if method == "concat" else {"r": 3}
        bank.combine(weights, name="ours", method=method, **options)
        with bank.route("ours"):
            wanted = outputs_of(bank.model)
        bank.detach()
        peft = PeftModel.from_pretrained(bank.model, folders["a"], "a")
        peft.load_adapter(folders["c"], "c")
        try:
            peft.add_weighted_adapter(
                [*weights], [*weights.values()], "theirs", combination_type=theirs,
                **({"svd_rank": 3} if options else {}),
            )  # fmt: skip
            peft.set_adapter("theirs")
            for path in ("linear", "mix"):
                layer = peft.get_submodule(f"base_model.model.{path}")
                got = layer.get_delta_weight("theirs")
                own = sum(weights[name] * layer.get_delta_weight(name) for name in weights)
                assert torch.allclose(got, own if method == "concat" else got, atol=1e-5)
            got = outputs_of(peft)
        finally:
            peft.unload()
        assert torch.allclose(got, wanted, atol=1e-4)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_saved_combination_loads_everywhere(self, bank, tmp_path, method):
        bank.combine(BLEND, name="all", method=method)
        wanted = outputs(bank, "all")
        folder = bank.save("all", tmp_path / "saved")
        bank.load(folder)
        assert torch.equal(outputs(bank, "saved"), wanted)
        assert dict(bank["saved"].tensors()).keys() == dict(bank["all"].tensors()).keys()
        bank.detach()
        peft = PeftModel.from_pretrained(bank.model, folder)
        with torch.no_grad():
            ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))
            assert torch.allclose(peft(ids), wanted, atol=1e-5)
        peft.unload()


def outputs_of(model):
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids)


class TestRefusals:
    """What cannot be combined is refused, and the bank is as it was."""

    @pytest.mark.parametrize(
        ("weights", "options"),
        [
            ({}, {}), ({"a": float("nan")}, {}), ({"a": 10**400}, {}), ({"a": float("inf"), "b": 1.0}, {"method": "svd"}), ({"a": "1"}, {}),
            ({"a": 1.0}, {"method": "linear"}), ({"a": 1.0}, {"method": "svd", "r": 0}), ({"a": None}, {}),
            ({"a": 1.0}, {"method": "svd", "r": 2.5}), ({"a": 1.0}, {"method": "svd", "r": 10**6}), ({"a": True}, {}),
            ({"a": 1.0}, {"method": "ties", "density": 0}), ({"a": 1.0}, {"method": "dare", "density": 1.5}),
            ({"a": 1.0}, {"method": "dare", "density": float("nan")}), ({"nobody": 1.0}, {}),
        ],
        ids=lambda value: str(value)[:40],
    )  # fmt: skip
    def test_what_cannot_be(self, bank, weights, options):
        before = outputs(bank, "a")
        with pytest.raises(LoradeckError) as caught:
            bank.combine(weights, name="x", **options)
        assert isinstance(caught.value, UnknownAdapterError if "nobody" in weights else ConfigError)
        assert bank.names() == ["a", "b", "c"]
        assert torch.equal(outputs(bank, "a"), before)

    @pytest.mark.parametrize("name", ["a", "../x", ""])
    def test_names(self, bank, name):
        with pytest.raises(AdapterNameError):
            bank.combine({"a": 1.0}, name=name)

    def test_a_grouped_convolution(self, bank, fill):
        fill(bank.add("grouped", LoraConfig(r=2, target_modules=["grouped"])))
        for method in METHODS:
            with pytest.raises(ConfigError, match="grouped convolution"):
                bank.combine({"a": 1.0, "grouped": 1.0}, name="x", method=method)

    def test_a_weight_that_overflows(self, bank):
        with pytest.raises(LoradeckError, match="overflows"):
            bank.combine({"a": 1e308}, name="x")
        assert bank.names() == ["a", "b", "c"]

    def test_adapters_of_other_bases(self):
        one = Adapter.of(LoraConfig(r=2), {"x": (torch.ones(2, 4), torch.ones(3, 2))})
        two = Adapter.of(LoraConfig(r=2), {"x": (torch.ones(2, 5), torch.ones(3, 2))})
        with pytest.raises(ConfigError, match="other shapes"):
            combine([(one, 1.0), (two, 1.0)])

    @pytest.mark.parametrize("method", METHODS)
    def test_an_adapter_that_is_not_finite(self, bank, method):
        with torch.no_grad():
            next(bank.parameters("b"))[0] = float("nan")
        with pytest.raises(LoradeckError, match="NaN or Inf"):
            bank.combine({"a": 1.0, "b": 1.0}, name="x", method=method)
        assert bank.names() == ["a", "b", "c"]


def test_half_precision_adapters_keep_their_type(fill):
    model = nn.ModuleDict({"x": nn.Linear(6, 5)})
    bank = Bank(model)
    generator = torch.Generator().manual_seed(0)
    pairs = {"x": tuple(torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 6), (5, 2)))}
    for name in "ab":
        bank.add(name, Adapter.of(LoraConfig(r=2), pairs))
    for method in METHODS:
        result = bank.combine({"a": 0.5, "b": 0.5}, name=method, method=method, density=1.0)
        assert {t.dtype for _, t in result.adapter.tensors()} == {torch.bfloat16}
        factor = 0.5 if method == "ties" else 1.0  # ties averages those that agree, and does not add them
        assert torch.allclose(dense(result.adapter, "x"), factor * dense(bank["a"], "x"), atol=0.3)


def test_a_stranger_is_peft_config():
    """PEFT itself takes the config that a combination is saved with."""
    adapter = Adapter.of(LoraConfig(r=2), {"linear": (torch.ones(2, 4), torch.ones(3, 2))})
    config = combine([(adapter, 1.0), (adapter, 1.0)]).adapter.config
    made = get_peft_model(
        nn.ModuleDict({"linear": nn.Linear(4, 3)}),
        PeftConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=[*config.target_modules]),
    )
    assert made.get_submodule("base_model.model.linear").scaling == {"default": 1.0}
