"""Which adapters each row goes through: entries, threads, tasks, multiplied rows, packed segments, errors."""

import asyncio
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from loradeck import Bank, LoraConfig
from loradeck.errors import RouteError, UnknownAdapterError
from loradeck.lora.routing import current

NAMES = ("a", "b", "c")


@pytest.fixture
def bank(fill) -> Bank:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).requires_grad_(False)
    bank = Bank(model)
    for seed, (name, r) in enumerate(zip(NAMES, (1, 4, 7), strict=True)):
        fill(bank.add(name, LoraConfig(r=r, target_modules=["0", "2"])), seed)
    return bank


def alone(bank: Bank, x: Tensor, entry: object) -> Tensor:
    with torch.no_grad(), bank.route(entry):
        return bank.model(x)


ENTRY = st.one_of(
    st.none(),
    st.sampled_from(NAMES),
    st.dictionaries(st.sampled_from(NAMES), st.floats(-2, 2, allow_subnormal=False), max_size=3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ENTRY, min_size=1, max_size=9))
def test_any_route_is_its_rows_alone(bank, rows) -> None:
    x = torch.randn(len(rows), 3, 6, generator=torch.Generator().manual_seed(0))
    mixed = alone(bank, x, rows)
    for i, entry in enumerate(rows):
        torch.testing.assert_close(mixed[i : i + 1], alone(bank, x[i : i + 1], entry), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(ENTRY, st.integers(1, 5)), min_size=1, max_size=6))
def test_packed_segments_are_their_tokens_alone(bank, segments) -> None:
    entries, lengths = [e for e, _ in segments], [n for _, n in segments]
    x = torch.randn(1, sum(lengths), 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), bank.route(entries, lengths=lengths):
        packed = bank.model(x)
    start = 0
    for entry, length in segments:
        own = slice(start, start + length)
        torch.testing.assert_close(packed[:, own], alone(bank, x[:, own], entry), rtol=1e-5, atol=1e-5)
        start += length


class TestEntries:
    def test_one_entry_is_for_every_row(self, bank) -> None:
        x = torch.randn(3, 6)
        assert torch.equal(alone(bank, x, "b"), alone(bank, x, ["b"] * 3))
        assert torch.equal(alone(bank, x, {"b": 1.0}), alone(bank, x, "b"))

    @pytest.mark.parametrize("base", [None, [None] * 3, {}, [{}, None, {"a": 0.0}]])
    def test_none_is_exactly_the_base(self, bank, base) -> None:
        x = torch.randn(3, 6)
        assert torch.equal(alone(bank, x, base), bank.model(x))

    @pytest.mark.parametrize(
        "rows", [[], 3, [3], {"a": float("nan")}, {"a": float("inf")}, {"a": "much"}, {3: 1.0}, {"a": True}]
    )
    def test_what_is_none_is_refused(self, bank, rows) -> None:
        with pytest.raises(RouteError):
            bank.route(rows)

    @pytest.mark.parametrize("lengths", [[1], [1, 2, 3], [0, 2], [-1, 3]])
    def test_lengths_go_with_entries(self, bank, lengths) -> None:
        with pytest.raises(RouteError, match="lengths"):
            bank.route(["a", "b"], lengths=lengths)

    def test_an_unknown_name_lists_close_ones(self, bank) -> None:
        bank.rename("a", "pirate")
        with pytest.raises(UnknownAdapterError, match="pirate"):
            bank.route(["b", "pirat"])

    def test_rows_must_fit(self, bank) -> None:
        with pytest.raises(RouteError, match=r"4 rows; the route is for 3"), bank.route(["a", "b", None]):
            bank.model(torch.randn(4, 6))
        with pytest.raises(RouteError, match=r"4 tokens; the route is for 3"), bank.route(["a", "b"], lengths=[1, 2]):
            bank.model(torch.randn(1, 4, 6))


class TestScope:
    def test_an_exception_leaves_nothing_set(self, bank) -> None:
        x = torch.randn(1, 6)
        with pytest.raises(ZeroDivisionError), bank.route("a"):
            raise ZeroDivisionError
        assert current(bank) is None
        assert torch.equal(bank.model(x), alone(bank, x, None))

    def test_the_innermost_counts(self, bank) -> None:
        x = torch.randn(1, 6)
        with torch.no_grad(), bank.route("a"):
            with bank.route(None):
                assert torch.equal(bank.model(x), alone(bank, x, None))
            assert torch.equal(bank.model(x), alone(bank, x, "a"))

    def test_two_banks_do_not_meet(self, bank, fill) -> None:
        other = Bank(nn.Sequential(nn.Linear(6, 6)))
        fill(other.add("a", LoraConfig(target_modules=["0"])))
        x = torch.randn(1, 6)
        with torch.no_grad(), bank.route("b"), other.route("a"):
            assert torch.equal(bank.model(x), alone(bank, x, "b"))
            assert not torch.equal(other.model(x), alone(other, x, None))

    def test_each_thread_has_its_own(self, bank) -> None:
        x, turns, wrong = torch.randn(2, 6), threading.Barrier(4), []

        def run(entry: object) -> None:
            wanted = alone(bank, x, entry)
            with torch.no_grad(), bank.route(entry):
                for _ in range(20):
                    turns.wait(timeout=30)
                    if not torch.equal(bank.model(x), wanted):
                        wrong.append(entry)

        threads = [
            threading.Thread(target=run, args=(entry,)) for entry in ("a", ["b", None], None, {"a": 0.5, "c": 2})
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_thread_begun_inside_a_route_begins_without(self, bank) -> None:
        x, seen = torch.randn(1, 6), []
        with torch.no_grad(), bank.route("a"):
            thread = threading.Thread(target=lambda: seen.append(bank.model(x)))
            thread.start()
            thread.join()
        assert torch.equal(seen[0], alone(bank, x, None))

    def test_each_task_has_its_own(self, bank) -> None:
        x = torch.randn(1, 6)

        async def run(entry: object) -> bool:
            wanted = alone(bank, x, entry)
            with torch.no_grad(), bank.route(entry):
                await asyncio.sleep(0)
                return torch.equal(bank.model(x), wanted)

        async def all_of_them() -> list[bool]:
            return await asyncio.gather(*(run(entry) for entry in (*NAMES, None) * 3))

        assert all(asyncio.run(all_of_them()))


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
)
def test_multiplied_rows_keep_their_entry(tiny: LlamaForCausalLM, fill, ids, how) -> None:
    bank = Bank(tiny)
    for seed, name in enumerate(NAMES):
        fill(bank.add(name, LoraConfig(r=4)), seed, size=0.2)
    rows = ["a", {"b": 0.5, "c": 1.0}, None, "c"]
    settings_ = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **how}
    count = how.get("num_return_sequences", 1)

    def answer(x: Tensor, route: object) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad(), bank.route(route):
            return tiny.generate(x, attention_mask=torch.ones_like(x), **settings_)

    mixed = answer(ids, rows)
    assert len(mixed) == 4 * count
    if "do_sample" in how:  # chance depends on the batch: compare what each row's adapter makes of it
        with torch.no_grad(), bank.route(rows):
            grown = tiny(mixed).logits
        for i, entry in enumerate(rows):
            own = slice(i * count, (i + 1) * count)
            with torch.no_grad(), bank.route(entry):
                torch.testing.assert_close(tiny(mixed[own]).logits, grown[own], rtol=1e-5, atol=1e-5)
        return
    for i, entry in enumerate(rows):
        assert torch.equal(answer(ids[i : i + 1], entry), mixed[i * count : (i + 1) * count])
