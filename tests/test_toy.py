"""The tutorial to the digit, and each fault of its layer absent."""

import pytest
import torch
from torch import Tensor, nn

from loradeck import Adapter, Bank, LoraConfig
from loradeck.toy import COLOURS, ToyModel, generate_token

IDS = torch.arange(8)[None]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)


def test_the_tutorial() -> None:
    model = ToyModel(1024)
    assert generate_token(model, IDS) == ["magenta"]
    x = torch.randn(1, 8, 1024)
    assert f"{x[0, 0, 0]:.4f}" == "0.4333"
    a, b = torch.randn(1024, 2), torch.randn(2, 1024)
    assert (a.numel() + b.numel()) / model.linear.weight.numel() == 0.00390625
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["linear"])
    bank = Bank(model)
    bank.add("first", Adapter.of(config, {"linear": (a.T, b.T)}))
    with bank.route("first"):
        y = model.linear(x)
    assert y.shape == (1, 8, 1024)
    torch.testing.assert_close(y, nn.functional.linear(x, model.linear.weight, model.linear.bias) + x @ a @ b)
    a, b = torch.randn(1024, 2), torch.randn(2, 1024)
    bank.add("second", Adapter.of(config, {"linear": (a.T, b.T)}))
    assert bank["second"].sites["linear"].scaling == 1
    with bank.route("second"):
        assert generate_token(model, IDS) == ["indigo"]
    assert generate_token(model, IDS) == ["magenta"]


def test_its_layers_and_colours() -> None:
    assert [name for name, _ in ToyModel(4).named_children()] == ["embedding", "linear", "lm_head"]
    assert tuple("red orange yellow green blue indigo violet magenta marigold chartreuse".split()) == COLOURS


class TestFaultsThatAreNotOurs:
    def test_layers_need_not_be_square(self) -> None:
        model = nn.Sequential(nn.Linear(6, 3))
        bank = Bank(model)
        adapter = bank.add("a", LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
        a, b = adapter.pair("0")
        assert (tuple(a.shape), tuple(b.shape)) == ((2, 6), (3, 2))
        nn.init.normal_(b)
        x = torch.randn(4, 6)
        with torch.no_grad(), bank.route("a"):
            torch.testing.assert_close(
                model(x), nn.functional.linear(x, model[0].weight, model[0].bias) + x @ a.T @ b.T
            )

    def test_tensors_move_with_the_model_and_are_its_parameters(self) -> None:
        model = ToyModel(16)
        bank = Bank(model)
        bank.add("a", LoraConfig(r=2))
        own = list(bank.parameters("a"))
        assert {id(p) for p in own} <= {id(p) for p in model.parameters()}
        model.to(torch.float64)
        assert all(parameter.dtype == torch.float64 for parameter in bank.parameters("a"))
        with bank.route("a"):
            assert model(IDS).dtype == torch.float64

    def test_a_fresh_adapter_changes_nothing(self) -> None:
        model = ToyModel(16)
        before = model(IDS)
        bank = Bank(model)
        bank.add("a", LoraConfig(r=2))
        with bank.route("a"):
            assert torch.equal(model(IDS), before)

    def test_there_is_a_scaling(self) -> None:
        model = ToyModel(16)
        bank = Bank(model)
        pair: dict[str, tuple[Tensor, Tensor]] = {"linear": (torch.randn(4, 16), torch.randn(16, 4))}
        x = torch.randn(2, 16)
        updates = []
        for name, config in {
            "one": LoraConfig(r=4, lora_alpha=4),
            "three": LoraConfig(r=4, lora_alpha=12),
            "root": LoraConfig(r=4, lora_alpha=12, use_rslora=True),
        }.items():
            bank.add(name, Adapter.of(config, pair))
            with torch.no_grad(), bank.route(name):
                updates.append(model.linear(x) - nn.functional.linear(x, model.linear.weight, model.linear.bias))
        torch.testing.assert_close(updates[1], 3 * updates[0])
        torch.testing.assert_close(updates[2], 6 * updates[0])
