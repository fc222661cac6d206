"""The adapters of one model: coming, going, their names, their tensors, and nothing stale."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from tests.digest import digest
from torch import nn

from loradeck import Adapter, Bank, LoraConfig
from loradeck.errors import AdapterError, AdapterNameError, LoradeckError, TargetError, UnknownAdapterError

LINEAR = LoraConfig(r=4, target_modules=["linear"])


class Net(nn.Module):
    """Two layers that are not square: (batch, 6) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return self.linear(self.first(x).relu())


@pytest.fixture
def bank():
    torch.manual_seed(0)
    return Bank(Net().eval().requires_grad_(False))


@pytest.fixture
def x():
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def through(bank, x, route):
    with torch.no_grad(), bank.route(route):
        return bank.model(x)


class TestComingAndGoing:
    """add, load, save, unload, rename, names."""

    def test_names_keep_their_order(self, bank, tmp_path):
        for name in ("b", "a", "c"):
            bank.add(name, LINEAR)
        assert bank.names() == ["b", "a", "c"]
        bank.rename("a", "z")
        assert bank.names() == ["b", "z", "c"]
        bank.unload("b")
        assert bank.load(bank.save("z", tmp_path / "folder")) == "folder"
        assert bank.names() == ["z", "c", "folder"]
        assert len(bank) == 3
        assert "z" in bank
        assert "b" not in bank

    def test_a_name_is_taken_once(self, bank, tmp_path):
        adapter = bank.add("a", LINEAR)
        bank.add("b", LINEAR)
        bank.save("a", tmp_path / "a")
        for take in (
            lambda: bank.add("a", LINEAR),
            lambda: bank.load(tmp_path / "a"),
            lambda: bank.rename("b", "a"),
            lambda: bank.combine({"a": 1.0}, name="b"),
        ):
            with pytest.raises(AdapterNameError, match="already resident"):
                take()
        bank.rename("a", "a")
        assert bank.names() == ["a", "b"]
        assert bank["a"] is adapter

    def test_an_unknown_name_lists_close_ones(self, bank):
        bank.add("pirate", LINEAR)
        bank.add("poet", LINEAR)
        for ask in (
            bank.unload,
            bank.parameters,
            lambda n: bank.rename(n, "x"),
            lambda n: bank.save(n, "x"),
            bank.merge,
        ):
            with pytest.raises(UnknownAdapterError, match=r"pirat.*\n.*pirate"):
                ask("pirat")
        assert bank.names() == ["pirate", "poet"]

    @pytest.mark.parametrize("name", ["../up", "a/b", "", " a", ".hidden", "a@1", "a\nb", "x" * 129, None, 3])
    def test_a_name_that_cannot_be_is_refused(self, bank, name, tmp_path):
        bank.add("a", LINEAR)
        bank.save("a", tmp_path / "a")
        with pytest.raises(AdapterNameError):
            bank.add(name, LINEAR)
        with pytest.raises(AdapterNameError):
            bank.rename("a", name)
        if name is not None:
            with pytest.raises(AdapterNameError):
                bank.load(tmp_path / "a", name)
        assert bank.names() == ["a"]

    @pytest.mark.parametrize(
        "name", ["1", "mlp", "lora", "a.b", "train", "linear", "forward", "weight", "ünïcode", "a b"]
    )
    def test_any_other_name_works(self, bank, fill, x, name, tmp_path):
        fill(bank.add(name, LINEAR))
        wanted = through(bank, x, name)
        assert not torch.equal(wanted, bank.model(x))
        bank.save(name, tmp_path / name)
        bank.unload(name)
        assert bank.load(tmp_path / name) == name
        assert torch.equal(through(bank, x, name), wanted)

    def test_check_reads_headers_and_adds_nothing(self, bank, tmp_path):
        bank.add("a", LINEAR)
        folder = bank.save("a", tmp_path / "a")
        bank.unload("a")
        assert bank.check(folder).folder == folder
        assert bank.names() == []
        (folder / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(AdapterError):
            bank.check(folder)

    def test_a_version_is_named_after_its_adapter(self, bank, tmp_path):
        bank.add("a", LINEAR)
        assert bank.load(bank.save("a", tmp_path / "poet@2")) == "poet"

    def test_names_that_look_alike_are_two_names(self, bank, fill, x):
        """However a bank spells them inside: nn.Module takes no dot."""
        names = ["a.b", "a∙b", "a%2Eb", "a%b", "a_b", "a..b"]
        for i, name in enumerate(names):
            fill(bank.add(name, LINEAR), seed=i)
        outputs = [through(bank, x, name) for name in names]
        assert len({float(y.sum()) for y in outputs}) == len(names)
        assert len([*bank.model.parameters()]) == 4 + 2 * len(names)
        for name in names:
            bank.unload(name)
        assert len([*bank.model.parameters()]) == 4

    def test_a_fresh_adapter_is_pefts(self):
        """Kaiming-uniform A of bound 1/sqrt(in), B zero; for embeddings A zero and B normal."""
        torch.manual_seed(0)
        model = nn.ModuleDict({"linear": nn.Linear(400, 5), "conv": nn.Conv1d(50, 4, 8), "embed": nn.Embedding(9, 500)})
        adapter = Bank(model).add("a", LoraConfig(r=8, target_modules=["linear", "conv", "embed"]))
        for path in ("linear", "conv"):
            a, b = adapter.pair(path)
            assert 0.97 / 20 < a.abs().max().item() <= 1 / 20
            assert a.mean().abs().item() < 0.003
            assert not bool(b.any())
        a, b = adapter.pair("embed")
        assert not bool(a.any())
        assert abs(b.std().item() - 1) < 0.05

    def test_a_generator_draws_the_same_again(self, bank):
        first, second = (bank.add(name, LINEAR, generator=torch.Generator().manual_seed(7)) for name in "ab")
        assert torch.equal(first.pair("linear")[0], second.pair("linear")[0])
        assert not torch.equal(bank.add("c", LINEAR).pair("linear")[0], first.pair("linear")[0])

    def test_adapters_stay_wide_on_a_narrow_base(self, bank):
        bank.model.bfloat16()
        assert {p.dtype for p in bank.add("a", LINEAR).parameters()} == {torch.float32}

    def test_a_ready_made_adapter(self, bank, x, tmp_path):
        """The tensors' rank counts, whatever the config's; what is saved loads again and means the same."""
        a, b = torch.randn(2, 6), torch.randn(5, 2)
        bank.add("made", Adapter.of(LoraConfig(r=8, lora_alpha=3), {"first": (a, b)}))
        wanted = bank.model.linear((bank.model.first(x) + 3 / 2 * x @ a.T @ b.T).relu())
        assert torch.allclose(through(bank, x, "made"), wanted, atol=1e-5)
        bank.load(bank.save("made", tmp_path / "saved"))
        assert torch.equal(through(bank, x, "saved"), through(bank, x, "made"))

    def test_a_ready_made_adapter_that_does_not_fit(self, bank):
        shapes = {"first": ((2, 7), (5, 2)), "linear": ((2, 5), (4, 2)), "third": ((2, 5), (3, 2))}
        pairs = {path: (torch.zeros(a), torch.zeros(b)) for path, (a, b) in shapes.items()}
        with pytest.raises(AdapterError) as caught:
            bank.add("made", Adapter.of(LoraConfig(r=2), pairs))
        assert len(caught.value.problems) == 3
        assert bank.names() == []
        assert bank.model.first.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()

    def test_one_adapter_under_two_names(self, bank, fill, x):
        bank.add("twin", fill(bank.add("a", LINEAR)))
        one = through(bank, x, [{"a": 1.0}, None, "twin"])
        two = through(bank, x, [{"a": 0.25, "twin": 0.75}, None, {"a": 2.0, "twin": -1.0}])
        assert torch.allclose(one, two, atol=1e-5)
        bank.unload("a")
        assert torch.allclose(through(bank, x, [None, None, "twin"])[2], one[2], atol=1e-6)

    def test_a_failed_add_changes_nothing(self, bank):
        bank.model.norm = nn.LayerNorm(3)
        keys = {path: set(vars(module)) for path, module in bank.model.named_modules()}
        for targets in (["nothing"], ["first", "norm"], r"(first|norm)"):
            with pytest.raises(TargetError):
                bank.add("a", LoraConfig(target_modules=targets))
        assert bank.names() == []
        assert {path: set(vars(module)) for path, module in bank.model.named_modules()} == keys

    def test_a_model_has_one_bank(self, bank):
        with pytest.raises(LoradeckError, match="already has a bank"):
            Bank(bank.model)
        bank.detach()
        second = Bank(bank.model)
        second.add("a", LINEAR)
        with pytest.raises(LoradeckError, match="already has a bank"):
            Bank(bank.model)


class TestContentHash:
    """What an adapter computes with, whatever it is called."""

    def test_it_is_of_the_content(self, bank, fill, tmp_path):
        first = digest(fill(bank.add("a", LINEAR)))
        bank.rename("a", "b")
        assert digest(bank["b"]) == first
        bank.load(bank.save("b", tmp_path / "c", note="x"))
        bank.load(tmp_path / "c", "thawed", trainable=True)
        assert digest(bank["c"]) == digest(bank["thawed"]) == first

    @pytest.mark.parametrize(
        "change",
        [
            lambda bank: next(bank.parameters("a"))[0, 0].add_(1e-6),
            lambda bank: bank["a"].double(),
            lambda bank: bank.add(
                "new", Adapter.of(LoraConfig(r=4, lora_alpha=17), {"linear": bank["a"].pair("linear")})
            ),
            lambda bank: bank.combine({"a": 1.0}, name="new"),
        ],
    )
    def test_whatever_changes_an_output_changes_it(self, bank, fill, change):
        first = digest(fill(bank.add("a", LINEAR)))
        with torch.no_grad():
            change(bank)
        assert digest(bank["new" if "new" in bank else "a"]) != first


class TestOnTheModel:
    """The adapters are of the model, and its checkpoints are the base's."""

    def test_parameters(self, bank, tmp_path):
        adapter = bank.add("a", LINEAR)
        own = [*bank.parameters("a")]
        assert [tuple(p.shape) for p in own] == [(4, 5), (3, 4)]
        assert all(p.requires_grad and any(p is q for q in bank.model.parameters()) for p in own)
        assert adapter.trainable
        assert adapter.nbytes == 4 * (4 * 5 + 3 * 4)
        bank.load(bank.save("a", tmp_path / "frozen"))
        assert not any(p.requires_grad for p in bank["frozen"].parameters())
        with pytest.raises(AdapterError, match="trainable=True"):
            bank.parameters("frozen")
        bank.load(tmp_path / "frozen", "thawed", trainable=True)
        assert [tuple(p.shape) for p in bank.parameters("thawed")] == [(4, 5), (3, 4)]

    def test_a_resident_adapter_costs_its_bytes(self, bank, fill, tmp_path):
        fill(bank.add("a", LoraConfig(r=3, target_modules=["first", "linear"])))
        bank.load(bank.save("a", tmp_path / "b"))
        assert sum(p.untyped_storage().nbytes() for p in bank["b"].parameters()) == bank["a"].nbytes
        storages = {t.untyped_storage().data_ptr() for _, t in bank["b"].tensors()}
        assert len(storages) == 1

    def test_checkpoints_are_the_bases(self, bank, fill, x):
        before = {key: tensor.clone() for key, tensor in bank.model.state_dict().items()}
        fill(bank.add("a", LINEAR))
        wanted = through(bank, x, "a")
        assert bank.model.state_dict().keys() == before.keys()
        assert bank.model.load_state_dict(before, strict=True).missing_keys == []
        assert torch.equal(through(bank, x, "a"), wanted)
        assert bank.model.linear.state_dict().keys() == nn.Linear(1, 1).state_dict().keys()

    def test_transformers_saves_the_base(self, tiny, fill, ids, tmp_path):
        before = tiny(ids).logits
        fill(Bank(tiny).add("a", LoraConfig()))
        tiny.save_pretrained(tmp_path)
        again = type(tiny).from_pretrained(tmp_path)
        assert torch.equal(again(ids).logits, before)

    @pytest.mark.parametrize("load", [False, True], ids=["added", "loaded"])
    def test_they_move_with_the_model(self, bank, fill, x, load, tmp_path):
        fill(bank.add("a", LINEAR))
        if load:
            bank.save("a", tmp_path / "a")
            bank.unload("a")
            bank.load(tmp_path / "a")
        for route in ("a", ["a", None, "a"]):
            before = through(bank, x, route)
            bank.model.to(torch.float64)
            assert {p.dtype for p in bank["a"].parameters()} == {torch.float64}
            after = through(bank, x.double(), route)
            assert after.dtype == torch.float64
            assert torch.allclose(after.float(), before, atol=1e-5)
            bank.model.float()

    def test_a_sequential_model(self, fill, x):
        """A model that calls all its children in turn must not stumble over the adapters' place among them."""
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)
        before = model(x)
        bank = Bank(model)
        assert torch.equal(model(x), before)
        fill(bank.add("a", LoraConfig(r=2, target_modules=["0", "2"])))
        assert torch.equal(model(x), before)
        assert not torch.equal(through(bank, x, "a"), before)
        bank.detach()
        assert len(model) == 3

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
    def test_a_copy_is_another_bank(self, bank, fill, x, copied):
        fill(bank.add("a", LoraConfig(r=2, target_modules=["first", "linear"], lora_dropout=0.5)))
        wanted = through(bank, x, ["a", None, "a"])
        twin = copied(bank)
        assert torch.equal(through(twin, x, ["a", None, "a"]), wanted)
        fill(twin["a"], seed=9)
        twin.add("b", LINEAR)
        twin.model.first.weight += 1
        assert torch.equal(through(bank, x, ["a", None, "a"]), wanted)
        assert bank.names() == ["a"]
        assert not torch.equal(through(twin, x, ["a", None, "a"]), wanted)
        twin.detach()
        assert torch.equal(through(bank, x, ["a", None, "a"]), wanted)

    def test_a_copy_made_under_a_route_has_none_open(self, bank, fill, x):
        fill(bank.add("a", LINEAR))
        with torch.no_grad(), bank.route("a"):
            twin = copy.deepcopy(bank)
            assert not torch.equal(bank.model(x), twin.model(x))
            twin.merge("a")
            twin.unmerge()
            twin.unload("a")
            assert set(vars(twin.model.linear)) == set(vars(nn.Linear(1, 1)))
        assert set(vars(bank.model.linear)) != set(vars(nn.Linear(1, 1)))

    def test_a_copied_model_carries_its_adapters(self, bank, fill, x):
        fill(bank.add("a", LINEAR))
        twin = copy.deepcopy(bank.model)
        assert torch.equal(twin(x), bank.model(x))
        with bank.route("a"):  # of the first model only
            assert torch.equal(twin(x), through(bank, x, None))
        with pytest.raises(LoradeckError, match="already has a bank"):
            Bank(twin)


class TestOtherTools:
    """Whatever else replaces a module's forward, before or after."""

    def test_one_that_was_there_before(self, bank, fill, x):
        linear = bank.model.linear
        own = linear.forward
        linear.forward = lambda x: 2 * own(x)
        hooked = linear.forward
        before = bank.model(x)
        fill(bank.add("a", LINEAR))
        assert torch.equal(bank.model(x), before)
        bank.detach()
        assert linear.forward is hooked

    def test_one_that_came_after(self, bank, fill, x):
        fill(bank.add("a", LINEAR))
        linear = bank.model.linear
        ours = linear.forward
        linear.forward = lambda x: 2 * ours(x)
        hooked = linear.forward
        routed = through(bank, x, "a")
        bank.detach()
        assert linear.forward is hooked
        assert torch.equal(
            bank.model(x), 2 * nn.functional.linear(bank.model.first(x).relu(), linear.weight, linear.bias)
        )
        assert not torch.equal(bank.model(x), routed)

    def test_a_bank_on_a_part_of_the_model(self, fill):
        """Two banks meet on one module; whichever goes first, the other goes on."""
        for first in (0, 1):
            model = nn.Module()
            model.part = Net().requires_grad_(False)
            banks, linear, x = (Bank(model), Bank(model.part)), model.part.linear, torch.randn(3, 5)
            before = linear(x)
            for seed, bank in enumerate(banks):
                fill(bank.add("a", LINEAR), seed=seed)
            with torch.no_grad(), banks[1 - first].route("a"):
                wanted = linear(x)
                banks[first].detach()
                assert torch.equal(linear(x), wanted)
                assert not torch.equal(wanted, before)
            banks[1 - first].detach()
            assert torch.equal(linear(x), before)


class TestUnloading:
    """What goes is gone, and nothing else is."""

    def test_the_last_one_frees_its_layers(self, bank, fill):
        own = set(vars(bank.model.linear))
        bank.add("a", LINEAR)
        bank.add("b", LoraConfig(target_modules=["first", "linear"]))
        assert set(vars(bank.model.linear)) == own | {"forward"}
        bank.unload("b")
        assert set(vars(bank.model.first)) == own
        assert set(vars(bank.model.linear)) == own | {"forward"}
        bank.unload("a")
        assert set(vars(bank.model.linear)) == own

    def test_its_memory_is_free(self, bank, fill, x, tmp_path):
        fill(bank.add("kept", LINEAR))
        fill(bank.add("gone", LINEAR))
        bank.load(bank.save("gone", tmp_path / "gone too"))
        for route in (["gone", "kept", None], ["gone too", "gone", "kept"], "gone", ["gone too", None, None]):
            through(bank, x, route)
        references = [weakref.ref(bank[name]) for name in ("gone", "gone too")]
        tensors = [weakref.ref(p) for name in ("gone", "gone too") for p in bank[name].parameters()]
        bank.unload("gone")
        bank.unload("gone too")
        gc.collect()
        assert all(reference() is None for reference in references + tensors)
        assert not torch.equal(through(bank, x, "kept"), bank.model(x))

    def test_an_open_route_keeps_it(self, bank, fill, x):
        fill(bank.add("a", LINEAR))
        with torch.no_grad():  # the same kernels as below
            wanted = through(bank, x, ["a", None, "a"])
        with torch.no_grad(), bank.route(["a", None, "a"]):
            bank.unload("a")
            assert torch.equal(bank.model(x), wanted)
        assert torch.equal(through(bank, x, None), bank.model(x))
        assert set(vars(bank.model.linear)) == set(vars(nn.Linear(1, 1)))


class TestNothingIsStale:
    """A working set is packed once and kept, but never beyond a change of what it holds."""

    MIX = ("a", None, "b")  # rows packed, since the batch is short

    @pytest.fixture(autouse=True)
    def two(self, bank, fill, x):
        for seed, name in enumerate("ab"):
            fill(bank.add(name, LINEAR), seed=seed)
        through(bank, x, self.MIX)

    def check(self, bank, x, *, changed=True, route=MIX):
        """Two rows in a mix are what they are alone, on a bank that has never seen a route."""
        y = through(bank, x, route)
        fresh = Bank(_base_of(bank))
        for name in bank.names():
            fresh.add(name, Adapter.of(bank[name].config, {p: bank[name].pair(p) for p in bank[name].sites}))
        assert torch.allclose(y, through(fresh, x, route), atol=1e-6)

    @pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
    @pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
    def test_after_a_step(self, bank, x, kind, optimizer):
        before = through(bank, x, self.MIX)
        own = optimizer([*bank.parameters("a"), *bank.parameters("b")], lr=0.5, **kind)
        for _ in range(2):
            with bank.route(self.MIX):
                bank.model(x).square().sum().backward()
            own.step()
            assert not torch.allclose(through(bank, x, self.MIX)[0], before[0], atol=1e-3)
            self.check(bank, x)

    def test_after_writes(self, bank, x):
        writes = [
            lambda p: p.mul_(2),
            lambda p: p[0].zero_(),
            lambda p: p.data.add_(1),
            lambda p: p.detach().numpy().__imul__(3),
            lambda p: p.copy_(torch.ones_like(p)),
            lambda p: setattr(p, "data", torch.full_like(p, 0.5)),
        ]
        for write in writes:
            with torch.no_grad():
                write([*bank.parameters("a")][1])
            self.check(bank, x)
        with torch.inference_mode():
            [*bank.parameters("a")][1].mul_(7)
        self.check(bank, x)

    def test_after_a_move(self, bank, x):
        before = through(bank, x, self.MIX)
        with torch.no_grad():
            bank.model.double()
            for p in bank.parameters("a"):
                p.mul_(2)
            bank.model.float()
        assert not torch.allclose(through(bank, x, self.MIX)[0], before[0], atol=1e-3)
        self.check(bank, x)

    @pytest.mark.parametrize("load", [False, True], ids=["added", "loaded"])
    def test_after_a_move_of_one_adapter(self, bank, x, load, tmp_path):
        if load:
            bank.save("a", tmp_path / "a")
            bank.unload("a")
            bank.load(tmp_path / "a")
            through(bank, x, self.MIX)
        with torch.no_grad():
            for p in bank["a"].double().parameters():
                p.mul_(2)
        self.check(bank, x)

    def test_after_a_rename(self, bank, x):
        before = through(bank, x, self.MIX)
        bank.rename("a", "c")
        bank.rename("b", "a")
        bank.rename("c", "b")
        after = through(bank, x, ("b", None, "a"))
        assert torch.equal(after, before)
        assert not torch.allclose(through(bank, x, self.MIX), before)
        self.check(bank, x)

    def test_after_another_came_under_its_name(self, bank, fill, x, tmp_path):
        for seed in (5, 6, 7):
            before = through(bank, x, self.MIX)
            bank.unload("a")
            fill(bank.add("a", LINEAR), seed=seed)
            bank.save("a", tmp_path / "a")
            bank.unload("a")
            bank.load(tmp_path / "a")
            assert not torch.allclose(through(bank, x, self.MIX)[0], before[0], atol=1e-3)
            self.check(bank, x)

    def test_after_freezing_and_thawing(self, bank, x):
        """Frozen, routed, thawed: it trains again."""
        for p in bank["a"].parameters():
            p.requires_grad_(False)
        with bank.route(("a", None, None)):
            bank.model(x)
        for p in bank["a"].parameters():
            p.requires_grad_(True)
        with bank.route(("a", None, None)):
            bank.model(x).sum().backward()
        assert all(bool(p.grad.any()) for p in bank.parameters("a"))

    def test_a_write_to_a_loaded_adapter(self, bank, x, tmp_path):
        bank.load(bank.save("a", tmp_path / "c"))
        mix = ("c", None, "b")
        before = through(bank, x, mix)
        with torch.no_grad():
            for p in bank["c"].parameters():
                p.mul_(2)
        assert not torch.allclose(through(bank, x, mix)[0], before[0], atol=1e-3)
        self.check(bank, x, route=mix)


def _base_of(bank):
    """A copy of the base without its bank."""
    net = Net()
    net.load_state_dict(bank.model.state_dict())
    return net.requires_grad_(False)


class TestInferenceMode:
    """Everything works inside it, and what was made inside it trains outside."""

    def test_made_inside_trained_outside(self, bank, x, fill, tmp_path):
        with torch.inference_mode():
            fill(bank.add("added", LINEAR))
            bank.save("added", tmp_path / "a")
            bank.load(tmp_path / "a", "thawed", trainable=True)
            bank.load(tmp_path / "a", "loaded")
            bank.combine({"added": 1.0, "loaded": 1.0}, name="both")
            bank.add("made", Adapter.of(LINEAR, {"linear": bank["loaded"].pair("linear")}, trainable=True))
            route = ["added", "loaded", {"both": 0.5, "thawed": 0.5}]
            served = bank.model(x)
            with bank.route(route):
                served = bank.model(x)
        assert torch.allclose(through(bank, x, route), served, atol=1e-6)
        for name in ("added", "thawed", "made"):
            optimizer = torch.optim.AdamW(bank.parameters(name), lr=0.1)
            before = through(bank, x, [name, None, "loaded"])
            with bank.route([name, None, "loaded"]):
                bank.model(x).square().sum().backward()
            optimizer.step()
            after = through(bank, x, [name, None, "loaded"])
            assert not torch.allclose(before[0], after[0])
            assert torch.equal(before[1], after[1])
            assert torch.allclose(before[2], after[2], atol=1e-6)

    def test_merged_inside(self, bank, x, fill):
        fill(bank.add("a", LINEAR))
        wanted = through(bank, x, "a")
        with torch.inference_mode():
            bank.merge("a")
        x = x.clone().requires_grad_()
        y = bank.model(x)
        y.sum().backward()
        assert torch.allclose(y, wanted, atol=1e-5)
        bank.unmerge()


class TestThreads:
    """A bank changes under one thread while others use it."""

    def test_loading_and_unloading_under_routes(self, bank, fill, x, tmp_path):
        for seed, name in enumerate("abc"):
            fill(bank.add(name, LINEAR), seed=seed)
            bank.save(name, tmp_path / name)
        wanted = through(bank, x, ["a", None, {"a": 0.5, "b": 0.5}])
        failures: list[BaseException] = []
        stop = threading.Event()

        def serve():
            try:
                while not stop.is_set():
                    assert torch.allclose(through(bank, x, ["a", None, {"a": 0.5, "b": 0.5}]), wanted, atol=1e-6)
            except BaseException as error:
                failures.append(error)

        def churn():
            try:
                for i in range(60):
                    bank.unload("c")
                    bank.load(tmp_path / "c")
                    bank.rename("c", f"c{i}")
                    bank.rename(f"c{i}", "c")
            except BaseException as error:
                failures.append(error)
            stop.set()

        threads = [threading.Thread(target=target) for target in (serve, serve, churn)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert failures == []
        assert bank.names() == ["a", "b", "c"]
