import copy
import threading

import pytest
import torch
from torch import Tensor, nn
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

from loradeck.base.frozen import UpcastLinear
from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train import loss
from loradeck.train.batching import collate
from loradeck.train.loss import HeadLoss, Losses

NOT = UNSUPERVISED
EXAMPLES = [
    Example([5, 6, 7, 8, 9, 10], [NOT, NOT, 7, 8, NOT, 10]),
    Example([1, 2, 3], [NOT, NOT, 3]),
    Example([4, 4], [4, 4]),
]
SUPERVISED = 5  # the first token of the third example is never predicted
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


def mean(model: PreTrainedModel) -> Tensor:
    with Losses(model).of(EXAMPLES) as losses:
        return losses.sum() / SUPERVISED


def model_loss(model: PreTrainedModel) -> Tensor:
    batch = collate(EXAMPLES, packed=False)
    outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    return outputs.loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_mean_is_the_models_own_loss(tiny: LlamaForCausalLM, kind: str, frozen: bool) -> None:
    model = (tiny if kind == "llama" else models()[kind]).eval().requires_grad_(True)
    if frozen:  # HeadLoss then computes the head, if its output is the logits
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    ours, theirs = mean(model), model_loss(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, expected = (torch.autograd.grad(each, trainable, retain_graph=True) for each in (ours, theirs))
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_each_example_has_its_own_loss(tiny: LlamaForCausalLM) -> None:
    with Losses(tiny).of(EXAMPLES) as losses:
        together = losses
    assert together.shape == (3,)
    for example, each in zip(EXAMPLES, together, strict=True):
        with Losses(tiny).of([example]) as alone:
            torch.testing.assert_close(alone[0], each, rtol=1e-5, atol=1e-5)
            assert alone.dtype == torch.float32


def test_the_head_runs_on_the_supervised_positions_alone(
    tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, if it is frozen, on a few of them at a time."""
    losses, forward, mm = Losses(tiny), nn.Linear.forward, torch.mm
    rows: list[int] = []

    def count(module: nn.Linear, hidden: Tensor) -> Tensor:
        if module is tiny.lm_head:
            rows.append(hidden.numel() // hidden.shape[-1])
        return forward(module, hidden)

    def count_mm(hidden: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
        rows.append(len(hidden))
        return mm(hidden, weight, out=out)

    monkeypatch.setattr(nn.Linear, "forward", count)
    monkeypatch.setattr(torch, "mm", count_mm)
    monkeypatch.setattr(loss, "ROWS", 2)
    for trainable in (False, True):
        tiny.lm_head.requires_grad_(trainable)
        with losses.of(EXAMPLES):
            pass
    assert rows == [2, 2, 1, SUPERVISED]
    assert not tiny.lm_head._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_the_head_at_a_time_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(7, 16, generator=generator).to(dtype)
    targets = torch.randint(50, (7,), generator=generator)

    def compute() -> tuple[Tensor, Tensor]:
        leaf = hidden.clone().requires_grad_()
        losses = loss.HeadLoss.apply(leaf, head, targets, True)
        losses.sum().backward()
        assert leaf.grad is not None
        return losses, leaf.grad

    whole = compute()
    monkeypatch.setattr(loss, "PART", 16 * 11)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(compute(), whole, rtol=rounding, atol=rounding * float(whole[1].abs().max()))


@pytest.mark.parametrize("kind", [nn.Linear, UpcastLinear])
@pytest.mark.parametrize("rows", [1, 3, 128])
def test_the_loss_of_the_head_passes_gradcheck(
    rows: int, kind: type[nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    head = nn.Linear(4, 11, bias=False, dtype=torch.float64).requires_grad_(False)
    head.__class__ = kind
    targets = torch.randint(11, (7,), generator=generator)
    assert torch.autograd.gradcheck(lambda h: HeadLoss.apply(h, head, targets, True), hidden)
    expected = torch.nn.functional.cross_entropy(hidden @ head.weight.T, targets, reduction="none")
    torch.testing.assert_close(HeadLoss.apply(hidden, head, targets, True), expected)


def test_an_error_leaves_the_model_as_it_was(tiny: LlamaForCausalLM) -> None:
    losses = Losses(tiny)
    with pytest.raises(IndexError), losses.of([Example([999, 1], [999, 1])]):
        pass
    assert not tiny.lm_head._forward_pre_hooks
    assert tiny.config._attn_implementation == "sdpa"


def test_another_thread_using_the_model_gets_all_its_logits(tiny: LlamaForCausalLM) -> None:
    ids, seen, losses = torch.tensor([[5, 6, 7], [8, 9, 3]]), [], Losses(tiny)
    thread = threading.Thread(target=lambda: seen.append(tiny(ids).logits.shape))

    def meanwhile(*_: object) -> None:
        if threading.current_thread() is not thread:
            thread.start()
            thread.join()

    hook = tiny.model.norm.register_forward_hook(meanwhile)
    tiny.lm_head.requires_grad_(True)  # a frozen head would not need the hook that selects positions
    with losses.of(EXAMPLES):
        pass
    hook.remove()
    assert seen == [(2, 3, 260)]


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_an_adapter_on_the_head_keeps_its_rows(tiny: LlamaForCausalLM, weight: float) -> None:
    bank = Bank(tiny)
    adapter = bank.add("one", LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    losses = Losses(tiny)
    with bank.route({"one": weight}):
        theirs = model_loss(tiny)
        with losses.of(EXAMPLES) as each:
            ours = each.sum() / SUPERVISED
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(ours, model_loss(tiny), rtol=1e-3)
    with bank.route([None, "one", None], lengths=[6, 3, 2]), losses.of(EXAMPLES) as mixed:
        pass
    with losses.of(EXAMPLES) as plain:
        pass
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(mixed[1], plain[1], rtol=1e-3)


def test_a_half_precision_base_has_its_loss_in_fp32(tiny: LlamaForCausalLM) -> None:
    half = copy.deepcopy(tiny).to(torch.bfloat16)
    ours = mean(half)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, model_loss(tiny), rtol=0.05, atol=0)
