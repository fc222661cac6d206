"""A shared copy shares every weight, and nothing else."""

import torch
from transformers import LlamaForCausalLM

from loradeck.base.weights import shared_copy


def test_weights_are_shared_and_nothing_else(tiny: LlamaForCausalLM) -> None:
    other = shared_copy(tiny)
    assert {name: p.data_ptr() for name, p in other.named_parameters()} == {
        name: p.data_ptr() for name, p in tiny.named_parameters()
    }
    assert {name: b.data_ptr() for name, b in other.named_buffers()} == {
        name: b.data_ptr() for name, b in tiny.named_buffers()
    }
    assert not {id(module) for module in tiny.modules()} & {id(module) for module in other.modules()}
    other.config._attn_implementation = "eager"
    other.model.layers[0].self_attn.q_proj.forward = lambda x: x * 0  # type: ignore[method-assign]
    assert tiny.config._attn_implementation != "eager"
    ids = torch.tensor([[5, 6]])
    assert torch.equal(tiny(ids).logits, shared_copy(tiny)(ids).logits)
    assert not torch.equal(tiny(ids).logits, other(ids).logits)


def test_tied_weights_stay_tied(tiny: LlamaForCausalLM) -> None:
    tiny.config.tie_word_embeddings = True
    tiny.lm_head.weight = tiny.model.embed_tokens.weight
    other = shared_copy(tiny)
    assert other.lm_head.weight is other.model.embed_tokens.weight is tiny.lm_head.weight
