"""Which adapters each row goes through: entries, threads, tasks, generation, and what is refused."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from loradeck import Bank, LoraConfig
from loradeck.errors import LoradeckError, RouteError, UnknownAdapterError

pytestmark = pytest.mark.slow

NAMES = ("poet", "pirate", "tiny")


@pytest.fixture
def bank(tiny, fill):
    """Three adapters of other ranks and targets on the tiny Llama."""
    bank = Bank(tiny)
    configs = (
        LoraConfig(r=4, target_modules="all-linear"),
        LoraConfig(r=8, lora_alpha=3, target_modules=["q_proj", "down_proj", "embed_tokens"]),
        LoraConfig(r=1, use_rslora=True, target_modules=["v_proj", "lm_head"]),
    )
    for i, (name, config) in enumerate(zip(NAMES, configs, strict=True)):
        fill(bank.add(name, config), seed=i, size=0.15)
    return bank


def logits(bank, ids, route, **options):
    with torch.no_grad(), bank.route(route, **options):
        return bank.model(ids).logits


def close(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


class TestEntries:
    """A name, None, or {name: weight}: one for the whole batch, or one per row."""

    def test_one_for_the_whole_batch(self, bank, ids):
        for entry in ("poet", None, {"poet": 0.5, "tiny": 2.0}):
            assert close(logits(bank, ids, entry), logits(bank, ids, [entry] * 4))
        assert torch.equal(logits(bank, ids, None), bank.model(ids).logits)
        assert not close(logits(bank, ids, "poet"), logits(bank, ids, None))

    def test_blends_are_sums_of_updates(self, bank):
        """On one layer, where the update is linear in the weights."""
        layer, x = bank.model.model.layers[0].self_attn.v_proj, torch.randn(3, 64)
        with torch.no_grad():
            base = layer(x)
            updates = {}
            for name in ("poet", "tiny"):
                with bank.route(name):
                    updates[name] = layer(x) - base
            with bank.route([{"poet": 0.7, "tiny": -0.3}, {"poet": 1.0}, {"tiny": 0}]):
                mixed = layer(x)
        assert close(mixed[0], (base + 0.7 * updates["poet"] - 0.3 * updates["tiny"])[0])
        assert close(mixed[1], (base + updates["poet"])[1])
        assert torch.equal(mixed[2], base[2])

    def test_an_empty_blend_and_weight_0_are_the_base(self, bank, ids):
        base = bank.model(ids).logits
        for entry in ({}, {"poet": 0}, {"poet": 0.0, "tiny": -0.0}):
            assert torch.equal(logits(bank, ids, entry), base)
            assert torch.equal(logits(bank, ids, [entry, "tiny", None, "poet"])[0], base[0])

    @pytest.mark.parametrize("rows", [("poet", None, "tiny", "poet"), ["poet"], [None], [{"poet": 1}] * 2])
    def test_any_sequence_will_do(self, bank, ids, rows):
        each = [entry for entry in rows for _ in range(4 // len(rows))]
        assert close(logits(bank, ids, rows), logits(bank, ids, each))

    @pytest.mark.parametrize(
        "rows",
        [3, ["poet", 3], [["poet"]], {"poet": "1"}, {"poet": float("nan")}, {"poet": float("inf")}, {"poet": 10**400}, {"poet": True}, {3: 1.0},
         [b"poet"], [], {"poet": None}, [{"poet": 1j}]],
        ids=lambda rows: str(rows)[:40],
    )  # fmt: skip
    def test_what_is_no_entry(self, bank, ids, rows):
        with pytest.raises(RouteError) as caught:
            bank.route(rows)
        assert caught.value.hint
        assert torch.equal(bank.model(ids).logits, logits(bank, ids, None))

    def test_unknown_names_list_close_ones(self, bank):
        for rows in ("pirat", ["poet", "pirat"], {"poet": 1, "pirat": 2}):
            with pytest.raises(UnknownAdapterError, match=r"'pirat'\n.*pirate"):
                bank.route(rows)
        with pytest.raises(UnknownAdapterError, match=r"Loaded: poet, pirate, tiny\."):
            bank.route("zzz")
        bank.detach()
        with pytest.raises(UnknownAdapterError, match="No adapter is loaded"):
            bank.route("poet")

    @pytest.mark.parametrize("count", [3, 5, 8])
    def test_a_batch_of_other_rows_is_refused(self, bank, ids, count):
        with bank.route(["poet"] * count), pytest.raises(RouteError, match=f"4 rows; the route is for {count}"):
            bank.model(ids)
        assert torch.equal(bank.model(ids).logits, logits(bank, ids, None))


class TestOddBatches:
    """Empty batches, single tokens, inputs by keyword, inputs of one dimension."""

    @pytest.mark.parametrize("rows", ["poet", ["poet", None, {"tiny": 0.5}]], ids=str)
    @pytest.mark.parametrize("grad", [False, True])
    def test_no_rows_at_all(self, bank, rows, grad):
        layer = bank.model.model.layers[0].self_attn.v_proj
        with torch.set_grad_enabled(grad), bank.route(rows):
            assert layer(torch.zeros(0, 64)).shape == (0, 32)
            assert layer(torch.zeros(0, 5, 64)).shape == (0, 5, 32)

    def test_by_keyword_and_without_a_batch(self, bank):
        layer, x = bank.model.model.layers[0].self_attn.v_proj, torch.randn(2, 64)
        with torch.no_grad(), bank.route("poet"):
            wanted = layer(x)
            assert torch.equal(layer(input=x), wanted)
            assert close(layer(x[0]), wanted[0])
        with torch.no_grad(), bank.route(["poet", None]):
            assert torch.equal(layer(input=x)[1], _base(layer, x)[1])

    @pytest.mark.parametrize("grad", [False, True])
    def test_under_autocast(self, bank, ids, grad):
        rows = ["poet", None, {"pirate": 0.5, "tiny": 1.0}, "poet"]
        wanted = logits(bank, ids, rows)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16), bank.route(rows):
            got = bank.model(ids).logits
        assert got.dtype == torch.bfloat16
        assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()

    def test_one_image_without_a_batch(self, fill):
        model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 2)}).requires_grad_(False)
        bank = Bank(model)
        fill(bank.add("a", LoraConfig(r=2, target_modules=["conv"])))
        image = torch.randn(3, 5, 5)
        with torch.no_grad(), bank.route("a"):
            assert close(model["conv"](image), model["conv"](image[None])[0])


def _base(layer, x):
    return torch.nn.functional.linear(x, layer.weight, layer.bias)


class TestPackedRows:
    """`lengths`: each entry is a segment of tokens of one packed row."""

    def test_segments_go_through_their_own(self, fill):
        linears = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).requires_grad_(False)
        packed = Bank(linears)
        with torch.no_grad():
            for seed, name in enumerate("ab"):
                fill(packed.add(name, LoraConfig(r=3, target_modules=["0", "2"])), seed=seed)
            x = torch.randn(1, 11, 6)
            entries, lengths = ["a", None, {"a": 0.5, "b": -1.0}, "a"], [2, 4, 1, 4]
            with packed.route(entries, lengths=lengths):
                together = linears(x)
            start = 0
            for entry, length in zip(entries, lengths, strict=True):
                with packed.route(entry):
                    alone = linears(x[:, start : start + length])
                assert close(together[:, start : start + length], alone)
                start += length

    def test_packed_sequences_of_a_language_model(self, bank, ids):
        """Positions restart at each segment, which is how transformers tells packed sequences apart."""
        lengths = [3, 7, 4]
        parts = [ids[i : i + 1, :length] for i, length in enumerate(lengths)]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with torch.no_grad(), bank.route(["poet", None, {"pirate": 0.5}], lengths=lengths):
            together = bank.model(torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
        alone = [logits(bank, part, entry) for part, entry in zip(parts, ["poet", None, {"pirate": 0.5}], strict=True)]
        assert close(together, torch.cat(alone, dim=1))

    @pytest.mark.parametrize("lengths", [[], [3], [3, 4, 7], [3, 0], [3, -4], [2.0, 5.0], ["3", "4"], [None, 6], 7])
    def test_lengths_that_do_not_go_with_the_entries(self, bank, lengths):
        with pytest.raises(RouteError, match="lengths"):
            bank.route(["poet", "tiny"], lengths=lengths)

    @pytest.mark.parametrize("kept", [[1, 1, 1], [3, 0, 2], [0, 0, 0], [3, 7, 4]], ids=str)
    def test_tokens_that_reach_the_head(self, bank, ids, kept):
        """The model's logits_to_keep selects them; `tiny` adapts the head, which the tokens of others pass too."""
        lengths, entries = [3, 7, 4], ["tiny", "poet", {"tiny": 0.5, "pirate": 0.2}]
        parts = [ids[i : i + 1, :length] for i, length in enumerate(lengths)]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        selected = [i for end, count in zip(ends, kept, strict=True) for i in range(end - count, end)]
        with torch.no_grad(), bank.route(entries, lengths=lengths, logits_to_keep=kept):
            together = bank.model(
                torch.cat(parts, dim=1), position_ids=positions, use_cache=False,
                logits_to_keep=torch.tensor(selected, dtype=torch.long),
            ).logits  # fmt: skip
        alone = [logits(bank, part, entry) for part, entry in zip(parts, entries, strict=True)]
        assert close(
            together, torch.cat([part[:, part.shape[1] - n :] for part, n in zip(alone, kept, strict=True)], 1)
        )

    @pytest.mark.parametrize("kept", [[], [1], [1, 1, 1], [4, 0], [-1, 1], [1.0, 1.0], [None, 1], 1])
    def test_counts_that_do_not_go_with_the_segments(self, bank, kept):
        with pytest.raises(RouteError, match="logits_to_keep"):
            bank.route(["poet", "tiny"], lengths=[3, 4], logits_to_keep=kept)
        with pytest.raises(RouteError, match="logits_to_keep"):
            bank.route(["poet", "tiny"], logits_to_keep=[1, 1])

    @pytest.mark.parametrize("lengths", [[3, 5], [6, 7], [14, 14]])
    def test_lengths_that_do_not_fit_the_tokens(self, bank, ids, lengths):
        with (
            bank.route(["poet", "tiny"], lengths=lengths),
            pytest.raises(RouteError, match="7 tokens; the route is for"),
        ):
            bank.model(ids[:1])


class TestGeneration:
    """transformers' generate multiplies rows by beams and by return sequences; each keeps its route."""

    PROMPTS = torch.randint(3, 260, (3, 5), generator=torch.Generator().manual_seed(2))
    ENTRIES = ("poet", None, {"pirate": 0.6, "tiny": 0.4})

    def generate(self, bank, ids, route, **options):
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
        with torch.no_grad(), bank.route(route):
            return bank.model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    @pytest.mark.parametrize(
        "options",
        [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}],
        ids=str,
    )
    def test_rows_are_what_they_are_alone(self, bank, options):
        together = self.generate(bank, self.PROMPTS, self.ENTRIES, **options)
        each = options.get("num_return_sequences", 1)
        for row, entry in enumerate(self.ENTRIES):
            alone = self.generate(bank, self.PROMPTS[row : row + 1], entry, **options)
            assert torch.equal(together[row * each : (row + 1) * each], alone)
        base = self.generate(bank, self.PROMPTS, None, **options)
        assert torch.equal(together[each : 2 * each], base[each : 2 * each])
        assert not torch.equal(together, base)

    def test_sampled_return_sequences(self, bank):
        torch.manual_seed(0)
        together = self.generate(bank, self.PROMPTS, self.ENTRIES, do_sample=True, num_return_sequences=4, top_k=0)
        with torch.no_grad():
            for row, entry in enumerate(self.ENTRIES):
                own = together[4 * row : 4 * row + 4]
                torch.manual_seed(0)
                assert len({tuple(sequence.tolist()) for sequence in own}) > 1
                assert torch.equal(own[:, :5], self.PROMPTS[row].expand(4, 5))
                assert close(logits(bank, own, entry), logits(bank, own, [entry] * 4))

    def test_every_mixed_step_is_packed_or_not_alike(self, bank):
        """Prefill is long and decoding is short: different ways, one answer."""
        ids = torch.randint(3, 260, (3, 60), generator=torch.Generator().manual_seed(4))
        together = self.generate(bank, ids, self.ENTRIES)
        for row, entry in enumerate(self.ENTRIES):
            assert torch.equal(together[row], self.generate(bank, ids[row : row + 1], entry)[0])


class TestWhoseRoute:
    """Each thread and each task has its own; nothing leaves one set."""

    def test_the_innermost_counts(self, bank, ids):
        wanted = {name: logits(bank, ids, name) for name in (*NAMES, None)}
        with torch.no_grad(), bank.route("poet"):
            with bank.route("tiny"):
                assert torch.equal(bank.model(ids).logits, wanted["tiny"])
                with bank.route(None):
                    assert torch.equal(bank.model(ids).logits, wanted[None])
            assert torch.equal(bank.model(ids).logits, wanted["poet"])

    def test_an_exception_never_leaves_it_set(self, bank, ids):
        base = bank.model(ids).logits
        for error in (ValueError, KeyboardInterrupt, RouteError):
            with pytest.raises(error), bank.route("poet"):
                raise error("stop")
            assert torch.equal(bank.model(ids).logits, base)
        with pytest.raises(RouteError), bank.route(["poet"] * 3):
            bank.model(ids)
        assert torch.equal(bank.model(ids).logits, base)
        with bank.route("poet"), pytest.raises(UnknownAdapterError), bank.route("nobody"):
            raise AssertionError("not reached")
        assert torch.equal(bank.model(ids).logits, base)

    def test_two_banks_do_not_mix(self, bank, ids, fill):
        other = nn.Linear(3, 3)
        second = Bank(nn.ModuleDict({"linear": other}))
        fill(second.add("poet", LoraConfig(r=2, target_modules=["linear"])))
        x = torch.randn(2, 3)
        with torch.no_grad():
            base, poet = other(x), logits(bank, ids, "poet")
            with second.route("poet"), bank.route("tiny"):
                assert not torch.equal(other(x), base)
                assert torch.equal(bank.model(ids).logits, logits(bank, ids, "tiny"))
            with bank.route("poet"):
                assert torch.equal(other(x), base)
                assert torch.equal(bank.model(ids).logits, poet)

    def test_threads(self, bank, ids):
        entries = [*NAMES, None, {"poet": 0.5, "tiny": 0.5}] * 2
        wanted = [logits(bank, ids, entry) for entry in entries]
        barrier = threading.Barrier(len(entries))

        def work(i):
            torch.set_num_threads(1)
            with torch.no_grad(), bank.route(entries[i]):
                barrier.wait(20)
                return [bank.model(ids).logits for _ in range(3)]

        with ThreadPoolExecutor(len(entries)) as pool:
            for got, expected in zip(pool.map(work, range(len(entries))), wanted, strict=True):
                assert all(torch.equal(each, expected) for each in got)

    def test_a_thread_begun_inside_a_route_begins_without_one(self, bank, ids):
        seen = []
        with torch.no_grad(), bank.route("poet"):
            thread = threading.Thread(target=lambda: seen.append(bank.model(ids).logits))
            thread.start()
            thread.join()
        assert torch.equal(seen[0], bank.model(ids).logits)

    def test_tasks(self, bank, ids):
        entries = [*NAMES, None]
        wanted = [logits(bank, ids, entry) for entry in entries]

        async def work(entry):
            got = []
            with bank.route(entry):
                for _ in range(3):
                    await asyncio.sleep(0)
                    got.append(bank.model(ids).logits)
            return got

        async def all_of_them():
            return await asyncio.gather(*[work(entry) for entry in entries])

        with torch.no_grad():  # of the thread, not of a task
            results = asyncio.run(all_of_them())
        for got, expected in zip(results, wanted, strict=True):
            assert all(torch.equal(each, expected) for each in got)

    def test_a_cancelled_task_leaves_nothing(self, bank, ids):
        base = bank.model(ids).logits

        async def work():
            with bank.route("poet"):
                await asyncio.sleep(60)

        async def cancel():
            task = asyncio.create_task(work())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return bank.model(ids).logits

        assert torch.equal(asyncio.run(cancel()), base)

    def test_a_route_is_of_its_moment(self, bank, ids, fill):
        """What a name meant when the route was made counts, whoever has the name later."""
        wanted = logits(bank, ids, "poet")
        route = bank.route("poet")
        bank.rename("poet", "bard")
        fill(bank.add("poet", LoraConfig(r=2)), seed=8)
        with torch.no_grad(), route:
            assert torch.equal(bank.model(ids).logits, wanted)


ENTRY = st.none() | st.sampled_from(NAMES) | st.dictionaries(st.sampled_from(NAMES), st.floats(-2, 2), max_size=3)


@settings(max_examples=30, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(entries=st.lists(ENTRY, min_size=1, max_size=5), seed=st.integers(0, 99), length=st.integers(1, 6))
def test_any_mix_is_its_rows(bank, entries, seed, length):
    ids = torch.randint(3, 260, (len(entries), length), generator=torch.Generator().manual_seed(seed))
    together = logits(bank, ids, entries)
    for row, entry in enumerate(entries):
        alone = logits(bank, ids[row : row + 1], entry)[0]
        assert (together[row] - alone).abs().max() <= 1e-5 * max(1.0, alone.abs().max().item())


@settings(max_examples=30, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(segments=st.lists(st.tuples(ENTRY, st.integers(1, 5)), min_size=1, max_size=5))
def test_any_packed_segments_are_their_tokens(bank, segments):
    layer = bank.model.model.layers[1].self_attn.q_proj
    entries, lengths = [entry for entry, _ in segments], [length for _, length in segments]
    x = torch.randn(1, sum(lengths), 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with bank.route(entries, lengths=lengths):
            together = layer(x)
        start = 0
        for entry, length in segments:
            with bank.route(entry):
                alone = layer(x[:, start : start + length])
            assert torch.allclose(together[:, start : start + length], alone, atol=1e-5, rtol=1e-5)
            start += length


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.sampled_from(NAMES), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(rows=JUNK, lengths=st.none() | st.lists(JUNK, max_size=3))
def test_any_junk_is_a_route_or_an_error_of_ours(bank, rows, lengths):
    try:
        route = bank.route(rows, lengths=lengths)
    except LoradeckError:
        return
    with route:
        assert lengths is None or len(lengths) == (len(rows) if isinstance(rows, list) else 1)
