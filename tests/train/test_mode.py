import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from loradeck.train.mode import evaluation, training


def test_the_bases_own_dropout_is_off_and_is_restored() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    ids = torch.tensor([[1, 2, 3]])
    expected = model.eval()(ids).logits
    dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert all(dropout == 0.1 for dropout in dropouts.values())
    with training(model):
        assert model.training
        assert torch.equal(model(ids).logits, expected)
    assert not model.training
    assert {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)} == dropouts
    model.train()
    assert not torch.equal(model(ids).logits, expected)


def test_modes_are_restored_module_by_module(tiny: LlamaForCausalLM) -> None:
    tiny.train()
    tiny.model.norm.eval()
    with evaluation(tiny):
        assert not any(module.training for module in tiny.modules())
    assert tiny.training
    assert not tiny.model.norm.training
    with training(tiny, gradient_checkpointing=True):
        assert all(layer.gradient_checkpointing for layer in tiny.model.layers)
        assert tiny.model.norm.training
    assert not any(layer.gradient_checkpointing for layer in tiny.model.layers)
    assert not tiny.model.norm.training
