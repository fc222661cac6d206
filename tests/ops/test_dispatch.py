"""Which implementation is used, what is cached between calls, and the index of a batch."""

import pytest
import torch
from torch import nn

from loradeck.ops import autograd, cpu, dispatch, portable, reference
from loradeck.ops.dropout import Dropout
from loradeck.ops.layer_kinds import LinearKind, kind_of
from loradeck.ops.mapping import KEPT, LoraMapping
from loradeck.ops.segments import Segments
from loradeck.ops.weights import LayerAdapters, LoraWeights

from .conftest import calls_of

CPU = torch.device("cpu")
MAPPING = LoraMapping((((0, 1.0),), (), ((1, 0.5),)), (1, 1, 1))


def layer(
    *, requires_grad: bool = False, dropout: Dropout | None = None, ranks: tuple[int, ...] = (2, 3), views: bool = True
) -> LayerAdapters:
    torch.manual_seed(0)
    weights = []
    for r in ranks:
        a, b = torch.randn(r, 4).requires_grad_(requires_grad), torch.randn(3, r).requires_grad_(requires_grad)
        weights.append(LoraWeights(*((a[:], b[:]) if views and not requires_grad else (a, b)), 1.0, dropout))
    return LayerAdapters(LinearKind(4, 3), tuple(weights))


@pytest.mark.skipif(cpu.why_not_available() is not None, reason=f"the C code {cpu.why_not_available()}")
class TestDispatch:
    """C outside autograd, one node under autograd, torch's products for dropout without gradients."""

    x, y = torch.randn(3, 4), torch.randn(3, 3)

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Segments]]:
        """The calls of each implementation."""
        modules = {"cpu": cpu, "autograd": autograd, "portable": portable}
        return {name: calls_of(monkeypatch, module) for name, module in modules.items()}

    def used(self, calls: dict[str, list[Segments]]) -> list[str]:
        names = [name for name, segments in calls.items() if segments]
        for segments in calls.values():
            segments.clear()
        return names

    def test_without_gradients(self, calls):
        with torch.no_grad():
            dispatch.lora(self.x, self.y.clone(), layer(), MAPPING, training=False)
        assert self.used(calls) == ["cpu"]

    def test_with_gradients(self, calls):
        dispatch.lora(self.x, self.y, layer(), MAPPING, training=False)
        assert self.used(calls) == ["autograd"]

    def test_with_dropout_and_without_gradients(self, calls):
        adapters = layer(dropout=Dropout(0.1))
        with torch.no_grad():
            dispatch.lora(self.x, self.y.clone(), adapters, MAPPING, training=True)
            assert self.used(calls) == ["portable"]
            dispatch.lora(self.x, self.y.clone(), adapters, MAPPING, training=False)
        assert self.used(calls) == ["cpu"]

    def test_without_a_compiler(self, calls, monkeypatch):
        monkeypatch.setattr(cpu, "takes", lambda x, y: False)
        with torch.no_grad():
            dispatch.lora(self.x, self.y.clone(), layer(), MAPPING, training=False)
        assert self.used(calls) == ["portable"]

    def test_a_batch_of_the_base_is_returned_as_it_is(self, calls):
        assert dispatch.lora(self.x, self.y, layer(), LoraMapping(((),) * 3, (1,) * 3), training=True) is self.y
        assert self.used(calls) == []

    def test_weights_that_are_thawed_later_train(self):
        adapters = layer(views=False)
        with torch.no_grad():
            dispatch.lora(self.x, self.y.clone(), adapters, MAPPING, training=False)
        adapters.weights[0].a.requires_grad_()
        adapters.weights[0].b.requires_grad_()
        dispatch.lora(self.x, self.y, adapters, MAPPING, training=False).sum().backward()
        assert adapters.weights[0].a.grad is not None

    def test_long_segments_beside_single_tokens(self, calls, monkeypatch):
        """A step of serving: single tokens of many adapters, and a chunk of somebody's prompt."""
        monkeypatch.setattr(cpu, "is_long", lambda tokens, r: tokens > 100)
        mapping = LoraMapping(tuple(((i, 1.0),) for i in range(6)), (1, 1, 1, 1, 1, 200))
        adapters, x, y = layer(ranks=(2,) * 6), torch.randn(1, 205, 4), torch.randn(1, 205, 3)
        with torch.no_grad():
            for _ in range(2):
                got = dispatch.lora(x, y.clone(), adapters, mapping, training=False)
        assert [segments.lengths for segments in calls["cpu"]] == [(1,) * 5] * 2
        assert [segments.lengths for segments in calls["portable"]] == [(200,)] * 2
        assert calls["cpu"][0] is calls["cpu"][1]  # split once
        torch.testing.assert_close(got, reference.lora(x, y, adapters, mapping), atol=1e-5, rtol=1e-5)


class TestCaches:
    """Casts are kept until a tensor is written to."""

    @pytest.mark.parametrize("compiled", [True, False])
    @pytest.mark.parametrize("half", ["a", "b"])
    def test_a_write_is_seen(self, half, compiled, monkeypatch):
        if not compiled:
            monkeypatch.setattr(cpu, "takes", lambda x, y: False)
        adapters = layer()

        def run(adapters: LayerAdapters) -> torch.Tensor:
            with torch.no_grad():
                return dispatch.lora(torch.ones(3, 4), torch.zeros(3, 3), adapters, MAPPING, training=False)

        before = run(adapters)
        getattr(adapters.weights[0], half).mul_(2)
        assert torch.allclose(run(adapters)[0], 2 * before[0])
        getattr(adapters.weights[0], half)[0].zero_()  # through a view
        assert torch.allclose(run(adapters), run(LayerAdapters(adapters.kind, adapters.weights)))

    def test_a_cast_is_renewed_after_a_write(self):
        adapters = layer()
        mapping = LoraMapping((((0, 1.0),),), (1,))
        x, y = torch.ones(1, 4, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
        before = dispatch.lora(x, y.clone(), adapters, mapping, training=False)
        weights = adapters.weights[0]
        assert weights.to(torch.float64) is weights.to(torch.float64)
        weights.b.mul_(3)
        assert torch.allclose(dispatch.lora(x, y.clone(), adapters, mapping, training=False), 3 * before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_trainable_weights_are_never_stale(self, dtype):
        """torch's fused optimizers and writes to `.data` leave the version counters as they are."""
        adapters = layer(requires_grad=True)
        x, y = torch.ones(3, 4, dtype=dtype), torch.zeros(3, 3, dtype=dtype)
        for mapping in (MAPPING, LoraMapping((((0, 1.0),),) * 3, (1,) * 3)):
            with torch.no_grad():
                before = dispatch.lora(x, y.clone(), adapters, mapping, training=False)
                adapters.weights[0].b.data.mul_(2)
                assert torch.allclose(dispatch.lora(x, y.clone(), adapters, mapping, training=False)[0], 2 * before[0])

    def test_caches_of_inference_mode_work_under_autograd(self):
        adapters, mapping = layer(), LoraMapping(MAPPING.entries, MAPPING.lengths)
        x = torch.randn(3, 4)
        with torch.inference_mode():
            dispatch.lora(x, torch.zeros(3, 3), adapters, mapping, training=False)
            dispatch.lora(x.double(), torch.zeros(3, 3).double(), adapters, mapping, training=False)
        x.requires_grad_()
        dispatch.lora(x, torch.zeros(3, 3), adapters, mapping, training=False).sum().backward()
        assert bool(x.grad[0].any())
        assert not bool(x.grad[1].any())


class TestSegments:
    """The tokens of a batch, sorted by adapter."""

    def test_the_arrays(self):
        a, b = ((0, 1.0),), ((1, 0.5), (0, 2.0))
        segments = LoraMapping((b, a, a, (), b), (1, 2, 1, 1, 1)).segments(2, CPU)
        assert segments.tokens == 12
        assert segments.adapters == (0, 1)
        assert segments.starts.tolist() == [0, 10, 14]
        assert segments.token_indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 0, 1, 10, 11]
        assert segments.weights.tolist() == [2.0, 2.0, *[1.0] * 6, 2.0, 2.0, *[0.5] * 4]
        assert segments.pair_adapters.tolist() == [0] * 10 + [1] * 4

    def test_contiguous_tokens_are_a_slice_with_one_weight(self):
        a = ((0, 1.0),)
        first, second = LoraMapping((a, a, ((1, 0.5),), ((1, 0.25),)), (1, 2, 3, 1)).segments(1, CPU).all
        assert (first.rows, first.weight, first.length) == (slice(0, 3), 1.0, 3)
        assert second.rows.tolist() == [3, 4, 5, 6]
        assert second.weight.flatten().tolist() == [0.5, 0.5, 0.5, 0.25]

    def test_by_token(self):
        segments = LoraMapping((((1, 1.0),), (), ((0, 1.0), (1, 1.0)), ((0, 1.0),)), (1,) * 4).segments(1, CPU)
        order, starts = segments.by_token
        assert starts.tolist() == [0, 1, 1, 3, 4]
        pairs = [[int(segments.pair_adapters[k]) for k in order[starts[t] : starts[t + 1]]] for t in range(4)]
        assert pairs == [[1], [], [0, 1], [0]]

    def test_they_are_made_once_for_all_layers(self):
        mapping = LoraMapping(MAPPING.entries, MAPPING.lengths)
        first = mapping.segments(1, CPU)
        assert mapping.segments(1, CPU) is first
        assert first.repeat(1) is first
        assert first.repeat(4) is first.repeat(4)
        for unit in range(2, 40):
            mapping.segments(unit, CPU)
        assert len(mapping._segments) <= KEPT

    def test_no_tokens(self):
        segments = MAPPING.segments(0, CPU)
        assert segments.adapters == ()
        assert segments.longest == 0
        assert segments.token_indices.numel() == segments.weights.numel() == 0


class TestLayerKinds:
    """Which layers take an adapter, and the shapes of their tensors."""

    def test_other_modules_are_refused_with_a_reason(self):
        for module in (
            nn.LayerNorm(4),
            nn.Bilinear(2, 2, 2),
            nn.ConvTranspose1d(2, 2, 2),
            nn.Conv3d(1, 1, 1),
            nn.ReLU(),
        ):
            assert "takes no adapter" in kind_of(module)
        assert "circular" in kind_of(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"))

    def test_shapes_are_pefts(self):
        assert kind_of(nn.Linear(7, 5)).shapes(2) == ((2, 7), (5, 2))
        assert kind_of(nn.Embedding(9, 5)).shapes(2) == ((2, 9), (5, 2))
        assert kind_of(nn.Conv2d(4, 6, (3, 2), groups=2)).shapes(8) == ((8, 4, 3, 2), (6, 4, 1, 1))

    def test_delta_is_the_change_of_the_weight(self, make):
        for kind in ("linear", "embedding", "conv1d", "conv2d", "transformers' Conv1D"):
            case = make(kind, count=1)
            weights = case.adapters.weights[0]
            case.layer.requires_grad_(False)
            case.layer.weight += weights.scaling * case.adapters.kind.delta(weights.a, weights.b)
            wanted = torch.stack([case.defined(row, ((0, 1.0),)) for row in range(8)])
            assert torch.allclose(case.layer(case.x).double(), wanted, atol=1e-5)

    @pytest.mark.parametrize("grad", [False, True])
    def test_the_result_has_the_strides_of_the_bases_output(self, make, kind, grad):
        """Or the next layers would select other kernels, which round differently."""
        case = make(kind, count=2)
        for y in (case.y, case.y.contiguous(memory_format=torch.channels_last) if "conv2d" in kind else case.y):
            for entries in ((((0, 1.0),), ()) * 2, (((0, 1.0),),) * 4):
                with torch.set_grad_enabled(grad):
                    mapping = LoraMapping(entries, (1,) * 4)
                    got = dispatch.lora(case.x[:4], y[:4].clone(), case.adapters, mapping, training=False)
                assert got.stride() == y[:4].stride()

    def test_a_grouped_convolution_has_no_delta(self, make):
        case = make("conv2d in groups", count=1)
        with pytest.raises(ValueError, match="groups"):
            case.adapters.kind.delta(case.adapters.weights[0].a, case.adapters.weights[0].b)
