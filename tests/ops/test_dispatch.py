"""Where the way is chosen, and what the chosen forms keep between calls."""

import pytest
import torch
from torch import nn

from loradeck.ops import cpu, dispatch, reference, stacked
from loradeck.ops.dropout import Dropout
from loradeck.ops.layer_kinds import LinearForm, form_of
from loradeck.ops.mapping import KEPT, Mix
from loradeck.ops.operands import Operands
from loradeck.ops.plan import plan_of
from loradeck.ops.weights import Pair

from .conftest import watched

MIX = Mix((((0, 1.0),), (), ((1, 0.5),)), (1, 1, 1))


def operands(*, trains: bool = False, dropout: Dropout | None = None, ranks: tuple[int, ...] = (2, 3)) -> Operands:
    torch.manual_seed(0)
    pairs = [
        Pair(torch.randn(r, 4).requires_grad_(trains), torch.randn(3, r).requires_grad_(trains), 1.0, dropout)
        for r in ranks
    ]
    return Operands(LinearForm(4, 3), tuple(pairs))


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(cpu, "takes", lambda x, y: False)


@pytest.mark.usefixtures("without_native")
class TestWays:
    """Stacks are for few rows of several adapters, outside autograd, where the C code cannot be had."""

    x, y = torch.randn(3, 4), torch.randn(3, 3)

    @pytest.fixture
    def stripes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The stripes of each call of `stacked`."""
        return watched(monkeypatch, stacked, lambda plan: len(plan.stripes))

    def test_few_rows_are_stacked(self, stripes):
        entries = tuple(((i, 1.0),) for i in range(4))
        with torch.no_grad():
            dispatch.lora(
                torch.randn(4, 4),
                torch.randn(4, 3),
                operands(ranks=(2, 3, 4, 1)),
                Mix(entries, (1,) * 4),
                training=False,
            )
        assert stripes == [1]

    def test_one_entry_for_all_rows_is_not(self, stripes):
        with torch.no_grad():
            dispatch.lora(self.x, self.y.clone(), operands(), Mix((((0, 1.0),),) * 3, (1,) * 3), training=False)
        assert not stripes

    def test_what_autograd_sees_is_not(self, stripes):
        dispatch.lora(self.x, self.y, operands(), MIX, training=False)
        assert not stripes

    def test_dropout_is_not(self, stripes):
        own = operands(dropout=Dropout(0.1))
        with torch.no_grad():
            dispatch.lora(self.x, self.y.clone(), own, MIX, training=True)
            assert not stripes
            dispatch.lora(self.x, self.y.clone(), own, MIX, training=False)
        assert stripes

    def test_a_pair_thawed_later_trains(self):
        own = operands()
        with torch.no_grad():
            dispatch.lora(self.x, self.y.clone(), own, MIX, training=False)
        own.pairs[0].a.requires_grad_()
        own.pairs[0].b.requires_grad_()
        dispatch.lora(self.x, self.y, own, MIX, training=False).sum().backward()
        assert own.pairs[0].a.grad is not None

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_an_input_that_was_written_to_is_another_input(self, mode):
        """Layers that share an input share its rows; it must be the same then."""
        entries = tuple(((i, 1.0),) for i in range(4))
        own, mix = operands(ranks=(2, 3, 4, 1)), Mix(entries, (1,) * 4)
        with mode():
            x, y = torch.randn(4, 4), torch.zeros(4, 3)
            first = dispatch.lora(x, y.clone(), own, mix, training=False)
            x.mul_(2)
            second = dispatch.lora(x, y.clone(), own, mix, training=False)
        torch.testing.assert_close(second, 2 * first)

    def test_long_runs_go_by_themselves_beside_single_rows(self):
        """A step of serving: single tokens of many, and a chunk of somebody's prompt."""
        entries = tuple(((i, 1.0),) for i in range(6))
        mix = Mix(entries, (1, 1, 1, 1, 1, 200))
        own, x = operands(ranks=(2,) * 6), torch.randn(1, 205, 4)
        with torch.no_grad():
            plan = plan_of(mix, own.slots, 1, x.device)
            assert [group.entry for group in plan.groups] == [((5, 1.0),)]
            assert [stripe.slots for stripe in plan.stripes] == [5]
            y = torch.randn(1, 205, 3)
            got = dispatch.lora(x, y.clone(), own, mix, training=False)
            torch.testing.assert_close(got, reference.lora(x, y, own, mix), atol=1e-5, rtol=1e-5)


class TestKept:
    """Stacks and casts are kept until a tensor is written to."""

    def run(self, own: Operands) -> torch.Tensor:
        with torch.no_grad():
            return dispatch.lora(torch.ones(3, 4), torch.zeros(3, 3), own, MIX, training=False)

    def test_it_is_made_once(self):
        own = operands()
        a, b = own.stack(4, torch.ones(1), 0, 2)
        again = own.stack(4, torch.ones(1), 0, 2)
        assert again[0] is a
        assert again[1] is b
        assert own.stack(4, torch.ones(1, dtype=torch.float64), 0, 2)[0].dtype == torch.float64
        assert own.stack(4, torch.ones(1, dtype=torch.bfloat16), 0, 2)[0].dtype == torch.float32  # on the CPU

    @pytest.mark.parametrize("half", ["a", "b"])
    def test_a_write_makes_it_anew(self, half):
        own = operands()
        before = self.run(own)
        getattr(own.pairs[0], half).mul_(2)
        assert torch.allclose(self.run(own)[0], 2 * before[0])
        getattr(own.pairs[0], half)[0].zero_()  # through a view
        fresh = Operands(own.form, own.pairs)
        assert torch.allclose(self.run(own), self.run(fresh))

    def test_a_cast_is_made_anew_too(self):
        own = operands()
        mix = Mix((((0, 1.0),),), (1,))
        x, y = torch.ones(1, 4, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
        before = dispatch.lora(x, y.clone(), own, mix, training=False)
        assert own.pair(0, torch.float64) is own.pair(0, torch.float64)
        own.pairs[0].b.mul_(3)
        assert torch.allclose(dispatch.lora(x, y.clone(), own, mix, training=False), 3 * before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_what_trains_is_never_stale(self, dtype):
        """torch's fused optimizers and writes to `.data` leave the version counters as they are."""
        own = operands(trains=True)
        x, y = torch.ones(3, 4, dtype=dtype), torch.zeros(3, 3, dtype=dtype)
        for mix in (MIX, Mix((((0, 1.0),),) * 3, (1,) * 3)):
            with torch.no_grad():
                before = dispatch.lora(x, y.clone(), own, mix, training=False)
                own.pairs[0].b.data.mul_(2)
                assert torch.allclose(dispatch.lora(x, y.clone(), own, mix, training=False)[0], 2 * before[0])

    def test_it_is_usable_under_autograd_after_inference_mode(self):
        own = operands()
        x = torch.randn(3, 4)
        with torch.inference_mode():
            dispatch.lora(x, torch.zeros(3, 3), own, MIX, training=False)
            dispatch.lora(x.double(), torch.zeros(3, 3).double(), own, MIX, training=False)
        x.requires_grad_()
        dispatch.lora(x, torch.zeros(3, 3), own, MIX, training=False).sum().backward()
        assert bool(x.grad[0].any())
        assert not bool(x.grad[1].any())


class TestMix:
    """A batch as runs and groups."""

    def test_neighbours_join_and_others_do_not(self):
        a, b = ((0, 1.0),), ((1, 1.0),)
        mix = Mix((a, a, b, (), a), (1, 2, 3, 1, 4))
        assert mix.total == 11
        assert {group.entry: group.spans for group in mix.groups} == {a: ((0, 3), (7, 11)), b: ((3, 6),), (): ((6, 7),)}

    def test_the_last_plans_are_kept(self):
        mix, cpu = Mix(MIX.entries, MIX.lengths), torch.device("cpu")
        first = plan_of(mix, ((4, 0), (4, 1)), 1, cpu)
        assert plan_of(mix, ((4, 0), (4, 1)), 1, cpu) is first
        for number in range(2, 40):
            plan_of(mix, ((4, 0), (4, number)), 1, cpu)
        assert len(mix.plans) <= KEPT


class TestForms:
    """Which layers take an adapter, and the shapes of their tensors."""

    def test_what_takes_none_says_so(self):
        for module in (
            nn.LayerNorm(4),
            nn.Bilinear(2, 2, 2),
            nn.ConvTranspose1d(2, 2, 2),
            nn.Conv3d(1, 1, 1),
            nn.ReLU(),
        ):
            assert "takes no adapter" in form_of(module)
        assert "circular" in form_of(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"))

    def test_shapes_are_pefts(self):
        assert form_of(nn.Linear(7, 5)).shapes(2) == ((2, 7), (5, 2))
        assert form_of(nn.Embedding(9, 5)).shapes(2) == ((2, 9), (5, 2))
        assert form_of(nn.Conv2d(4, 6, (3, 2), groups=2)).shapes(8) == ((8, 4, 3, 2), (6, 4, 1, 1))

    def test_delta_is_the_change_of_the_weight(self, make):
        for kind in ("linear", "embedding", "conv1d", "conv2d", "transformers' Conv1D"):
            case = make(kind, count=1)
            pair = case.operands.pairs[0]
            case.layer.requires_grad_(False)
            case.layer.weight += pair.scaling * case.operands.form.delta(pair.a, pair.b)
            wanted = torch.stack([case.defined(row, ((0, 1.0),)) for row in range(8)])
            assert torch.allclose(case.layer(case.x).double(), wanted, atol=1e-5)

    @pytest.mark.parametrize("grad", [False, True])
    def test_the_result_lies_in_memory_as_the_bases_output(self, make, kind, grad):
        """Or the layers after it would take other kernels, which round otherwise."""
        case = make(kind, count=2)
        for y in (case.y, case.y.contiguous(memory_format=torch.channels_last) if "conv2d" in kind else case.y):
            for entries in ((((0, 1.0),), ()) * 2, (((0, 1.0),),) * 4):
                with torch.set_grad_enabled(grad):
                    mix = Mix(entries, (1,) * 4)
                    got = dispatch.lora(case.x[:4], y[:4].clone(), case.operands, mix, training=False)
                assert got.stride() == y[:4].stride()

    def test_a_grouped_convolution_has_no_delta(self, make):
        case = make("conv2d in groups", count=1)
        with pytest.raises(ValueError, match="groups"):
            case.operands.form.delta(case.operands.pairs[0].a, case.operands.pairs[0].b)
