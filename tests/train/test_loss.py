import copy
import threading

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train.batching import Batch, collate
from loradeck.train.example import UNSUPERVISED, Example
from loradeck.train.loss import causal_loss

NOT = UNSUPERVISED
EXAMPLES = [
    Example([5, 6, 7, 8, 9, 10], [NOT, NOT, 7, 8, NOT, 10]),
    Example([1, 2, 3], [NOT, NOT, 3]),
    Example([4, 4], [4, 4]),
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIALS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def models() -> dict[str, PreTrainedModel]:
    few = {"vocab_size": 97, **SIZES, **SPECIALS, "num_key_value_heads": 2}
    gpt2 = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIALS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "gpt2": GPT2LMHeadModel(gpt2),
            "gemma2": Gemma2ForCausalLM(Gemma2Config(**few, head_dim=8, final_logit_softcapping=0.1)),
            "granite": GraniteForCausalLM(GraniteConfig(**few, logits_scaling=0.1)),
            "cohere": CohereForCausalLM(CohereConfig(**few, logit_scale=3.0)),
        }


def own_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss


def gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*model.parameters()])])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "granite", "cohere"])
def test_the_mean_is_the_models_own_loss(tiny: LlamaForCausalLM, kind: str) -> None:
    model = (tiny if kind == "llama" else models()[kind]).eval().requires_grad_(True)
    batch = collate(EXAMPLES)
    total, supervised = causal_loss(model, batch)
    assert supervised == 5  # the first token of the third example is read, never predicted
    torch.testing.assert_close(total / supervised, own_loss(model, batch), rtol=1e-5, atol=1e-6)
    expected = gradient(model, own_loss(model, batch))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient(model, total / supervised), expected, rtol=1e-4, atol=1e-6)


def test_only_supervised_positions_enter_the_head(tiny: LlamaForCausalLM) -> None:
    shapes = []
    hook = tiny.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    causal_loss(tiny, collate(EXAMPLES))
    hook.remove()
    assert shapes == [(1, 5, 260)]
    assert not tiny.lm_head._forward_pre_hooks


def test_the_model_is_itself_again_after_an_error(tiny: LlamaForCausalLM) -> None:
    with pytest.raises(IndexError):
        causal_loss(tiny, collate([Example([999, 1], [999, 1])]))
    assert not tiny.lm_head._forward_pre_hooks


def test_another_thread_using_the_model_gets_all_its_logits(tiny: LlamaForCausalLM) -> None:
    batch, seen = collate(EXAMPLES), []
    thread = threading.Thread(target=lambda: seen.append(tiny(batch.input_ids).logits.shape))

    def meanwhile(*_: object) -> None:
        if threading.current_thread() is not thread:
            thread.start()
            thread.join()

    hook = tiny.model.norm.register_forward_hook(meanwhile)
    causal_loss(tiny, batch)
    hook.remove()
    assert seen == [(3, 6, 260)]


def test_the_sum_does_not_depend_on_the_batch(tiny: LlamaForCausalLM) -> None:
    together, _count = causal_loss(tiny, collate(EXAMPLES))
    alone = sum(causal_loss(tiny, collate([example]))[0] for example in EXAMPLES)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("route", ["one", [None, "one", {"one": 0.5}]])
def test_an_adapter_on_the_head_keeps_its_rows(tiny: LlamaForCausalLM, route: str | list) -> None:
    bank = Bank(tiny)
    adapter = bank.add("one", LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    batch = collate(EXAMPLES)
    with bank.route(route):
        total, supervised = causal_loss(tiny, batch)
        expected = own_loss(tiny, batch)
    torch.testing.assert_close(total / supervised, expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(total / supervised, own_loss(tiny, batch), rtol=1e-3)


def test_a_half_precision_base_has_its_loss_in_fp32(tiny: LlamaForCausalLM) -> None:
    half = copy.deepcopy(tiny).to(torch.bfloat16)
    total, supervised = causal_loss(half, collate(EXAMPLES))
    assert total.dtype == torch.float32
    torch.testing.assert_close(total / supervised, own_loss(tiny, collate(EXAMPLES)), rtol=0.05, atol=0)
