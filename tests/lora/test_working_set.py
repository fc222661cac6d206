"""Working sets: each row is as alone whatever came before, newcomers cost nothing, and nothing is kept too long."""

import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from loradeck import Adapter, Bank, LoraConfig
from loradeck.lora.flat import FlatLayout
from loradeck.lora.working_set import KEPT_SETS
from loradeck.ops import cpu
from loradeck.ops.weights import LoraWeights

PATHS = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qo"]
IDS = torch.arange(24).view(6, 4)


def adapter(seed: int, r: int, paths: list[str] = PATHS) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: (torch.randn(r, 64, generator=generator) / 8, torch.randn(64, r, generator=generator)) for path in paths
    }
    return Adapter.of(LoraConfig(r=r, lora_alpha=r, target_modules=["q_proj", "o_proj"]), pairs)


@pytest.fixture
def bank(tiny: LlamaForCausalLM) -> Bank:
    """Eight adapters of many ranks; a few leave layers alone."""
    made = Bank(tiny)
    for seed in range(8):
        made.add(f"a{seed}", adapter(seed, r=1 + seed, paths=PATHS if seed % 3 else PATHS[:1] + PATHS[3:]))
    return made


def run(bank: Bank, rows: list) -> torch.Tensor:
    with torch.no_grad(), bank.route(rows):
        return bank.model(IDS[: len(rows)]).logits


@pytest.fixture
def loaded(bank: Bank, tmp_path: Path) -> Bank:
    """The same adapters, loaded from files."""
    for name in bank.names():
        bank.save(name, tmp_path / name)
        bank.unload(name)
    for folder in sorted(tmp_path.iterdir()):
        bank.load(folder)
    return bank


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the objects and tensors that are made for a layer's adapter, and the layouts of files."""
    counts = {"views": 0, "weights": 0, "lookups": 0, "layouts": 0}

    def count(owner: type, name: str, key: str) -> None:
        method = getattr(owner, name)

        def counted(*args: object, **settings: object) -> object:
            counts[key] += 1
            return method(*args, **settings)

        monkeypatch.setattr(owner, name, counted)

    count(Adapter, "_tensor", "views")
    count(LoraWeights, "__init__", "weights")
    count(LoraWeights, "address", "lookups")
    monkeypatch.setattr(FlatLayout, "of", _counted(FlatLayout.of, counts))
    return counts


def _counted(method: Callable[..., FlatLayout], counts: dict[str, int]) -> Callable[..., FlatLayout]:
    def counted(*args: object) -> FlatLayout:
        counts["layouts"] += 1
        return method(*args)

    return counted


needs_compiler = pytest.mark.skipif(cpu.why_not_available() is not None, reason=f"the C code {cpu.why_not_available()}")


@needs_compiler
def test_newcomers_make_no_tensor_and_no_object_per_layer(loaded: Bank, calls: dict[str, int]) -> None:
    """What a first step after a switch costs: addresses come from arrays that adapters of one layout share."""
    run(loaded, ["a1", "a2", "a4", "a5", "a7", None])
    assert calls == {"views": 0, "weights": 0, "lookups": 0, "layouts": 5}
    run(loaded, ["a5", "a7", "a4", "a2", "a1", None])
    run(loaded, ["a0", "a3", "a6", "a1", "a2", None])
    assert calls == {"views": 0, "weights": 0, "lookups": 0, "layouts": 8}
    loaded._working_sets.clear()
    run(loaded, ["a0", "a1", "a2", "a3", "a4", "a5"])
    assert calls == {"views": 0, "weights": 0, "lookups": 0, "layouts": 8}


@needs_compiler
def test_adapters_of_one_layout_share_it(bank: Bank, tmp_path: Path, calls: dict[str, int]) -> None:
    for seed in range(4):
        adapter(seed, r=4).save(tmp_path / str(seed))
    names = [bank.load(folder) for folder in sorted(tmp_path.iterdir())]
    run(bank, names)
    assert calls["layouts"] == 1
    assert len({id(bank[name].layout) for name in names}) == 1


def test_without_a_compiler_views_are_made_once(
    loaded: Bank, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets share them, so that one newcomer costs its own only."""
    monkeypatch.setattr(cpu, "takes", lambda x, y: False)
    layers = {name: len(loaded[name].sites) for name in loaded.names()}
    run(loaded, ["a1", "a2", "a4"])
    assert calls["weights"] == sum(layers[name] for name in ("a1", "a2", "a4"))
    run(loaded, ["a1", "a7", "a4"])
    assert calls["weights"] == sum(layers[name] for name in ("a1", "a2", "a4", "a7"))
    run(loaded, ["a4", "a1", None])
    loaded.unload("a2")
    run(loaded, ["a7", "a1", "a4"])
    assert calls["weights"] == sum(layers[name] for name in ("a1", "a2", "a4", "a7"))
    assert calls["views"] == 2 * calls["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("from_files", [True, False])
def test_what_moves_an_adapter_is_followed(bank: Bank, tmp_path: Path, from_files: bool) -> None:
    """Casts and moves create new tensors; memory of parameters can be exchanged; writes in place are seen at once."""
    if from_files:
        bank.save("a1", tmp_path / "a1")
        bank.unload("a1")
        bank.load(tmp_path / "a1")
    rows = ["a1", "a2", None]
    before = run(bank, rows)
    bank["a1"].double()
    torch.testing.assert_close(run(bank, rows), before, atol=1e-5, rtol=1e-4)
    bank["a1"].float()
    torch.testing.assert_close(run(bank, rows), before, atol=1e-5, rtol=1e-4)
    bank["a1"].bfloat16()
    assert 0 < (run(bank, rows)[0] - before[0]).abs().max() < 1
    bank["a1"].float()
    if not from_files:
        for parameter in bank["a1"].parameters():
            parameter.data = parameter.detach().clone()
        gc.collect()
    with torch.no_grad():
        for parameter in bank["a1"].parameters():
            parameter.zero_()
    after = run(bank, rows)
    assert torch.equal(after[1:], run(bank, [None, "a2", None])[1:])
    torch.testing.assert_close(after[0], run(bank, [None] * 3)[0])


@pytest.mark.slow
def test_whatever_came_before_each_row_is_as_alone(bank: Bank) -> None:
    rng = random.Random(0)
    alone = {name: run(bank, [name] * 6) for name in [*bank.names(), None]}
    for _ in range(60):
        rows = [rng.choice([*bank.names(), None]) for _ in range(6)]
        got = run(bank, rows)
        for row, name in enumerate(rows):
            torch.testing.assert_close(got[row], alone[name][row], atol=1e-5, rtol=1e-4)
        if rng.random() < 0.3:
            name = rng.choice(bank.names())
            bank.unload(name)
            seed = int(name[1:])
            bank.add(name, adapter(seed, r=1 + seed, paths=PATHS if seed % 3 else PATHS[:1] + PATHS[3:]))


def test_a_route_that_is_not_entered_yet_stays_right(bank: Bank) -> None:
    expected = run(bank, ["a1", "a2"])
    waiting = bank.route(["a1", "a2"])
    for rows in (["a3", "a4"], ["a5", "a6"], ["a7", "a0"], ["a6", "a3"]):
        run(bank, rows)
    with torch.no_grad(), waiting:
        got = bank.model(IDS[:2]).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_an_open_route_stays_right_while_others_come_and_go(bank: Bank) -> None:
    expected = run(bank, ["a1", "a2"])
    with torch.no_grad(), bank.route(["a1", "a2"]):
        for rows in (["a3", "a4"], ["a5", "a6"], ["a7", "a0"]):
            run(bank, rows)
            torch.testing.assert_close(bank.model(IDS[:2]).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_graph_keeps_what_it_needs(bank: Bank) -> None:
    """Other routes must not write to what a backward pass needs."""
    embedded = bank.model.get_input_embeddings()(IDS[:2]).detach().requires_grad_()

    def gradient(disturb: bool) -> torch.Tensor:
        with bank.route(["a1", "a2"]):
            loss = bank.model(inputs_embeds=embedded).logits.sin().sum()
        if disturb:
            for rows in (["a1", "a3"], ["a4", "a5"], ["a6", "a7"]):
                run(bank, rows)
        return torch.autograd.grad(loss, embedded)[0]

    assert torch.equal(gradient(disturb=False), gradient(disturb=True))


def test_few_sets_are_kept(bank: Bank) -> None:
    for i in range(7):
        run(bank, [f"a{i}", f"a{i + 1}"])
    assert len(bank._working_sets._recent) == KEPT_SETS


def test_fewer_adapters_reuse_a_set(bank: Bank) -> None:
    sets = []
    for names in (["a1", "a2", "a4"], ["a4", "a1", None], ["a2", "a2", "a1"]):
        with bank.route(names):
            sets.append(bank._working_sets._recent[0])
    assert sets[0] is sets[1] is sets[2]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_an_unloaded_adapter_leaves_nothing(loaded: Bank, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(cpu, "takes", lambda x, y: False)
    expected = run(loaded, ["a1", "a2", "a4"])
    run(loaded, ["a1", "a4", None])  # a2 stays in the set
    references = [weakref.ref(loaded["a2"]), *(weakref.ref(each) for each in loaded["a2"].parameters())]
    loaded.unload("a2")
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    got = run(loaded, ["a1", None, "a4"])
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-4)


def test_addresses_stay_valid_while_a_route_is_open(loaded: Bank) -> None:
    """Even if the adapter is cast or unloaded meanwhile, its old tensors are alive."""
    expected = run(loaded, ["a1", "a2"])
    with torch.no_grad(), loaded.route(["a1", "a2"]):
        loaded.model(IDS[:2])
        loaded["a1"].double()
        loaded.unload("a2")
        gc.collect()
        got = loaded.model(IDS[:2]).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
