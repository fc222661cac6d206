"""The laws of the design that exist by now: what must hold whatever else changes."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.digest import digest
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from loradeck import Bank, LoraConfig
from loradeck.errors import RouteError

CONFIGS = {
    "small": LoraConfig(r=1, lora_alpha=3, target_modules=["q_proj", "v_proj"]),
    "large": LoraConfig(r=64, lora_alpha=16, target_modules="all-linear"),
    "stable": LoraConfig(r=7, lora_alpha=5, use_rslora=True, target_modules="attention"),
    "whole": LoraConfig(
        r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "down_proj"], rank_pattern={"lm_head": 2}
    ),
}

MIXES = {
    "base only": [None] * 4,
    "identical": ["large"] * 4,
    "distinct": ["small", "large", "stable", "whole"],
    "with the base": ["whole", None, "small", None],
    "apart": ["small", "stable", "small", "stable"],
    "blended": [{"small": 0.7, "large": 0.3}, None, {"whole": -1.5}, {"stable": 0.5, "small": 2, "whole": 0.25}],
}


@pytest.fixture
def bank(tiny, fill):
    bank = Bank(tiny)
    for i, (name, config) in enumerate(CONFIGS.items()):
        fill(bank.add(name, config), seed=i, size=0.1)
    return bank


class TestRowsAreAlone:
    """Law 1: a mixed batch equals each row run alone."""

    @pytest.mark.slow
    @pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
    @pytest.mark.parametrize("grad", [False, True], ids=["served", "trained"])
    def test_a_mixed_batch_is_its_rows(self, bank, ids, mix, grad):
        with torch.set_grad_enabled(grad), bank.route(mix):
            together = bank.model(ids).logits
        base = bank.model(ids).logits
        for row, entry in enumerate(mix):
            with torch.set_grad_enabled(grad), bank.route(entry):
                alone = bank.model(ids[row : row + 1]).logits[0]
            assert torch.allclose(together[row], alone, atol=1e-5, rtol=1e-5)
            assert torch.equal(together[row], base[row]) == (entry is None)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
    def test_a_broken_neighbour_changes_nothing(self, bank, ids, bad):
        mix = ["small", "broken", None, {"large": 0.5, "whole": 1.0}]
        with torch.no_grad():
            with bank.route([*mix[:1], None, *mix[2:]]):
                wanted = bank.model(ids).logits
            for parameter in bank.add("broken", LoraConfig(r=3)).parameters():
                parameter.fill_(bad)
            with bank.route(mix):
                got = bank.model(ids).logits
        sound = [0, 2, 3]
        assert torch.allclose(got[sound], wanted[sound], atol=1e-5, rtol=1e-5)
        assert torch.equal(got[2], wanted[2])
        assert not bool(torch.isfinite(got[1]).all())
        with torch.no_grad(), bank.route([{"broken": 0, "small": 1.0}, None, None, {"broken": 0.0}]):
            got = bank.model(ids).logits
        assert torch.allclose(got[0], wanted[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(got[1:3], bank.model(ids).logits[1:3])


class TestNothingIsLeftBehind:
    """Law 2: fresh adapters change nothing, and a detached model is what it was."""

    def test_a_fresh_adapter_is_bit_identical(self, zoo, tiny, ids):
        for model, batch in ((zoo, torch.randint(11, (4, 6))), (tiny, ids)):
            paths = [path for path, module in model.named_modules() if not [*module.children()] and "norm" not in path]
            paths = [path for path in paths if "act" not in path and "rotary" not in path]
            before = model(batch)
            bank = Bank(model)
            for name, r in (("one", 2), ("two", 4)):
                bank.add(name, LoraConfig(r=r, target_modules=paths, lora_dropout=0.5))
                assert len(bank[name].sites) == len(paths) > 5
            for training in (False, True):
                model.train(training)
                for route in ("one", ["one", None, "two", {"one": 3.0, "two": -1.0}]):
                    with bank.route(route):
                        after = model(batch)
                    if model is tiny:
                        assert torch.equal(after.logits, before.logits)
                    else:
                        assert torch.equal(after, before)

    def test_detach_restores_the_model(self, zoo, fill):
        ids = torch.randint(11, (4, 6))
        before, weights, state = (
            zoo(ids),
            dict(zoo.named_parameters()),
            {k: v.clone() for k, v in zoo.state_dict().items()},
        )
        kept = [(path, type(module), set(vars(module)), [*module._modules]) for path, module in zoo.named_modules()]
        bank = Bank(zoo)
        fill(bank.add("a", LoraConfig(target_modules=["embed", "conv1", "conv2", "mix", "linear"])))
        with bank.route("a"):
            assert not torch.equal(zoo(ids), before)
        bank.merge("a")
        assert not torch.equal(zoo(ids), before)
        bank.detach()
        assert torch.equal(zoo(ids), before)
        assert [(path, type(m), set(vars(m)), [*m._modules]) for path, m in zoo.named_modules()] == kept
        assert zoo.state_dict().keys() == state.keys()
        assert all(torch.equal(zoo.state_dict()[key], value) for key, value in state.items())
        assert all(parameter is weights[name] for name, parameter in zoo.named_parameters())
        Bank(zoo)  # and it takes another bank

    def test_training_leaves_the_base_byte_for_byte(self, bank, ids):
        names = {name: p for name, p in bank.model.named_parameters() if not name.startswith("loradeck")}
        before = {name: p.clone() for name, p in names.items()}
        bank.model.requires_grad_(True).train()
        optimizers = [torch.optim.AdamW(bank.parameters(name), lr=0.1) for name in bank.names()]
        for _ in range(3):
            with bank.route(["small", "large", {"stable": 0.5, "small": 0.5}, "whole"]):
                bank.model(ids).logits.logsumexp(-1).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert all(torch.equal(p, before[name]) for name, p in names.items())


JOBS = {
    "a": (LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]), 2e-2),
    "b": (LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.2), 3e-3),
    "c": (LoraConfig(r=5, use_rslora=True, target_modules=["embed_tokens", "down_proj"], lora_dropout=0.5), 1e-2),
}
ROWS = {"a": [0, 3], "b": [1], "c": [2, 4, 5]}  # of one batch: the jobs' rows are not all neighbours
STEPS = 4


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.reentrant = reentrant

    def forward(self, x):
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


class TestJobsAreAlone:
    """Law 3, as far as it exists: adapters trained in one batch equal each trained alone."""

    def batches(self):
        return torch.randint(3, 260, (STEPS, 6, 9), generator=torch.Generator().manual_seed(3))

    def losses(self, bank, batch, jobs):
        with bank.route(jobs):
            logits = bank.model(batch).logits
        flat = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        return flat.view(len(jobs), -1).mean(1)

    def train(self, model: nn.Module, names: list[str], breaks: str | None = None):
        """Train the named jobs on their rows of the common batches; return their losses and final tensors."""
        bank = Bank(model.train())
        optimizers = {}
        for name in names:
            config, lr = JOBS[name]
            bank.add(name, config, generator=torch.Generator().manual_seed(ord(name)))
            optimizers[name] = torch.optim.AdamW(bank.parameters(name), lr=lr, eps=1e-6)
        rows = sorted(row for name in names for row in ROWS[name])
        jobs = [name for row in rows for name in names if row in ROWS[name]]
        history: dict[str, list[float]] = {name: [] for name in names}
        for step, batch in enumerate(self.batches()):
            if step == 2 and breaks:
                with torch.no_grad():
                    next(bank.parameters(breaks)).fill_(math.nan)
            losses = self.losses(bank, batch[rows], jobs)
            own = {name: losses[[i for i, job in enumerate(jobs) if job == name]].mean() for name in names}
            sum(own.values()).backward()
            for name in names:
                history[name].append(own[name].item())
                optimizers[name].step()
                optimizers[name].zero_grad()
        tensors = {name: {key: t.detach().clone() for key, t in bank[name].tensors()} for name in names}
        bank.detach()
        return history, tensors

    def compare(self, together, alone, name):
        assert together[0][name] == pytest.approx(alone[0][name], abs=1e-5)
        for key, tensor in alone[1][name].items():
            assert torch.allclose(together[1][name][key], tensor, atol=1e-5), key

    @pytest.mark.slow
    def test_together_is_alone(self, tiny):
        together = self.train(tiny, ["a", "b", "c"])
        for name in JOBS:
            alone = self.train(tiny, [name])
            self.compare(together, alone, name)
            assert alone[0][name][-1] != alone[0][name][0]
            assert all(bool(t.any()) for t in alone[1][name].values())  # it trained: no A and no B is still zero

    def test_a_broken_job_touches_no_other(self, tiny):
        together = self.train(tiny, ["a", "b", "c"], breaks="b")
        assert math.isnan(together[0]["b"][-1])
        for name in ("a", "c"):
            self.compare(together, self.train(tiny, [name]), name)

    def test_a_job_without_rows_gets_no_gradient(self, tiny, ids):
        bank = Bank(tiny)
        for name in JOBS:
            bank.add(name, JOBS[name][0])
        with bank.route(["a", None, "a", {"c": 0.0}]):
            tiny(ids).logits.square().mean().backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in bank.parameters("a"))
        for name in ("b", "c"):
            assert all(p.grad is None or not bool(p.grad.any()) for p in bank.parameters(name))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_gradients(self, reentrant):
        torch.manual_seed(0)
        bank = Bank(Checkpointed(reentrant))
        fill = [bank.add(name, LoraConfig(r=2, target_modules=["inner"])) for name in "ab"]
        x = torch.randn(4, 3, requires_grad=True)
        grads = []
        for own in (None, reentrant):
            bank.model.reentrant = own
            with bank.route(["a", "b", None, "a"]):
                bank.model(x).square().sum().backward()
            grads.append([p.grad.clone() for adapter in fill for p in adapter.parameters()])
            bank.model.zero_grad()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
        assert all(bool(g.any()) for g in grads[1][1::2])  # B's; A's are zero while B is

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_computed_again_in_another_thread(self, reentrant):
        """As torch does it for CUDA: the only open route is meant."""
        torch.manual_seed(0)
        bank = Bank(Checkpointed(reentrant))
        adapter = bank.add("a", LoraConfig(r=2, target_modules=["inner"]))
        x, grads = torch.randn(4, 3, requires_grad=True), []
        for elsewhere in (False, True):
            with bank.route(["a", None, "a", "a"]):
                loss = bank.model(x).square().sum()
                if elsewhere:
                    with ThreadPoolExecutor(1) as pool:
                        pool.submit(loss.backward).result(30)
                else:
                    loss.backward()
            grads.append([p.grad.clone() for p in adapter.parameters()])
            bank.model.zero_grad()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
        assert bool(grads[1][1].any())

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_computed_again_outside_of_its_route(self, reentrant):
        """Not an adapter that stays as it is without a word."""
        bank = Bank(Checkpointed(reentrant))
        bank.add("a", LoraConfig(r=2, target_modules=["inner"]))
        with bank.route("a"):
            loss = bank.model(torch.randn(4, 3, requires_grad=True)).square().sum()
        with pytest.raises(RouteError, match="outside of any route"):
            loss.backward()
        with bank.route(None):
            bank.model(torch.randn(4, 3, requires_grad=True)).sum().backward()

    def test_checkpointed_dropout_is_refused(self):
        bank = Bank(Checkpointed(False))
        bank.add("a", LoraConfig(r=2, target_modules=["inner"], lora_dropout=0.5))
        with bank.route("a"), pytest.raises(RouteError, match="gradient checkpointing"):
            bank.model(torch.randn(4, 3)).sum().backward()


def test_save_then_load_is_byte_identical(bank, tmp_path):
    """Law 4; PEFT's side of it is in test_peft.py."""
    for name in bank.names():
        bank.save(name, tmp_path / name)
        bank.load(tmp_path / name, f"{name} again")
        bank.save(f"{name} again", tmp_path / "again" / name)
        for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "again" / name / file).read_bytes()
        wanted, got = dict(bank[name].tensors()), dict(bank[f"{name} again"].tensors())
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[key], got[key]) and wanted[key].dtype == got[key].dtype for key in wanted)
        assert digest(bank[name]) == digest(bank[f"{name} again"])
