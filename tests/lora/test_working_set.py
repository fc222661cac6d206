"""Working sets that turn into one another: what lies in their packs, and who may still rely on it."""

import gc
import random
import weakref

import pytest
import torch
from transformers import LlamaForCausalLM

from loradeck import Adapter, Bank, LoraConfig
from loradeck.lora.container import KEPT_SETS
from loradeck.lora.routing import KEPT_SLOTS, placed
from loradeck.ops import cpu, plan
from loradeck.ops.stack import Stack

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
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks of each pair that is copied into a pack."""
    monkeypatch.setattr(cpu, "takes", lambda x, y: False)  # so that stacks are used
    monkeypatch.setattr(plan, "SEGMENT", 1e9)
    seen: list[int] = []
    put = Stack._put

    def spy(stack, slot, pair):
        seen.append(pair.r)
        return put(stack, slot, pair)

    monkeypatch.setattr(Stack, "_put", spy)
    return seen


def test_whatever_came_before_each_row_is_as_alone(bank: Bank) -> None:
    chance = random.Random(0)
    alone = {name: run(bank, [name] * 6) for name in [*bank.names(), None]}
    for _ in range(60):
        rows = [chance.choice([*bank.names(), None]) for _ in range(6)]
        got = run(bank, rows)
        for row, name in enumerate(rows):
            torch.testing.assert_close(got[row], alone[name][row], atol=1e-5, rtol=1e-4)
        if chance.random() < 0.3:
            name = chance.choice(bank.names())
            bank.unload(name)
            seed = int(name[1:])
            bank.add(name, adapter(seed, r=1 + seed, paths=PATHS if seed % 3 else PATHS[:1] + PATHS[3:]))


def test_only_newcomers_are_copied(bank: Bank, copies: list[int]) -> None:
    run(bank, ["a1", "a2", "a4", "a5"])
    assert sorted(set(copies)) == [2, 3, 5, 6]
    copies.clear()
    run(bank, ["a1", "a7", "a4", "a5"])
    assert set(copies) == {8}
    copies.clear()
    run(bank, ["a4", "a7", "a1", None])
    run(bank, ["a1", "a4", "a7", "a5"])
    assert copies == []


def test_an_adapter_that_is_written_to_is_copied_again(bank: Bank, copies: list[int]) -> None:
    before = run(bank, ["a1", "a2", "a4"])
    copies.clear()
    with torch.no_grad():
        for parameter in bank["a2"].parameters():
            parameter.mul_(3)
    after = run(bank, ["a1", "a2", "a4"])
    assert set(copies) == {3}
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-2)


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
    """A frozen adapter's pack is part of the graph; other routes must not write to it before the backward pass."""
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
    assert len(bank._working_sets._known) <= KEPT_SETS


def test_an_unloaded_adapter_leaves_nothing_and_the_others_stay(bank: Bank, copies: list[int]) -> None:
    expected = run(bank, ["a1", "a2", "a4"])
    run(bank, ["a1", "a4", None])  # a2 stays in the set, though nobody asks for it
    gone = weakref.ref(bank["a2"].pair(PATHS[0])[0])
    adapter_gone = weakref.ref(bank["a2"])
    copies.clear()
    bank.unload("a2")
    gc.collect()
    assert gone() is None
    assert adapter_gone() is None
    got = run(bank, ["a1", None, "a4"])
    assert copies == []
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-4)


# ---- where they lie


def fake(r: int) -> Adapter:
    return adapter(0, r, PATHS[:1])


def test_newcomers_take_the_first_free_slot_of_their_width() -> None:
    a, b, c, d = (fake(r) for r in (4, 3, 5, 1))
    before = placed([a, b, c], {})
    assert before == {a: (4, 0), b: (4, 1), c: (8, 0)}
    assert placed([b, c, d], before)[d] == (4, 0)


def test_slots_lie_close_together() -> None:
    own = [fake(4) for _ in range(6)]
    before = placed(own, {})
    assert placed([own[5]], before)[own[5]] == (4, 0)
    after = placed([own[0], own[3], own[5]], before)
    assert [after[own[i]] for i in (0, 3, 5)] == [(4, 0), (4, 3), (4, 5)]  # half of the slots: moving costs more


def test_those_that_left_stay_while_nobody_needs_their_place() -> None:
    own = [fake(4) for _ in range(4)]
    before = placed(own, {})
    after = placed(own[:2], before)
    assert after == before
    assert [*after][:2] == own[:2]
    many = [fake(4) for _ in range(KEPT_SLOTS + 2)]
    assert len(placed(many[:1], placed(many, {}))) == KEPT_SLOTS
