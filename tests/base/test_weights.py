"""Weight formats: one copy of each weight, the same fingerprint, and adapters work as on the plain base."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loradeck import Bank, LoraConfig
from loradeck.base.frozen import UpcastLinear
from loradeck.base.load import SMOLLM2, Base
from loradeck.base.prepacked import TOLERANCE, PackedLinear, why_not_packed
from loradeck.base.quantised import QuantisedEmbedding, QuantisedLinear
from loradeck.base.weights import CHOICES, prepare, shared_copy
from loradeck.dtypes import computes_in
from loradeck.errors import AdapterError, BaseModelError, ConfigError

# PEFT 0.21 asks transformers 5 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Small = Callable[..., LlamaForCausalLM]
BITS = {"int8": 8.5, "int4": 5}
SHARES = {"int8": 0.05, "int4": 0.5}  # how far a random model's logits are off, of the largest
PREPARED = [choice for choice in CHOICES if choice != "plain"]
IDS = torch.randint(3, 260, (4, 12), generator=torch.Generator().manual_seed(3))


def size(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def kinds(model: nn.Module) -> Counter[type]:
    return Counter(type(module) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding))


def near(result: Tensor, expected: Tensor, share: float) -> bool:
    return float((result - expected).abs().max()) <= share * float(expected.abs().max())


def pair(small: Small, weights: str) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A prepared model, and the plain one with the very weights that the prepared one stands for."""
    model, plain = small(), small()
    prepare(model, weights)
    for prepared, other in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(prepared, QuantisedLinear | QuantisedEmbedding):
            other.weight = nn.Parameter(prepared.dense().contiguous(), requires_grad=False)
    return model, plain


def filled(bank: Bank, name: str, config: LoraConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bank.add(name, config, generator=generator).parameters():
            parameter.normal_(0, 0.05, generator=generator)


# ---- what is prepared


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_keeps_one_copy(small: Small, dtype: torch.dtype) -> None:
    if why := why_not_packed(dtype):
        pytest.skip(f"packed {dtype}: {why}")
    plain, model = small(dtype), small(dtype)
    prepare(model, "packed")
    small_layer = nn.Linear if computes_in(dtype, torch.device("cpu")) else UpcastLinear  # k and v are not packed
    assert kinds(model) == {PackedLinear: 2 * 5 + 1, small_layer: 2 * 2, nn.Embedding: 1}
    assert size(model) == size(plain)
    assert [*dict(model.named_parameters())] == [*dict(plain.named_parameters())]


def test_a_tied_head_stays_plain_and_tied(small: Small) -> None:
    model = small(tied=True)
    prepare(model, "packed")
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert size(model) == size(small(tied=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", BITS)
def test_quantised_weights_take_their_bits(small: Small, weights: str, tied: bool) -> None:
    model = small(tied=tied)
    prepare(model, weights)
    assert kinds(model) == {QuantisedLinear: 2 * 7 + 1, QuantisedEmbedding: 1}
    assert size(model) < 1.1 * BITS[weights] / 32 * size(small(tied=tied))  # padded to whole tiles
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("weights", BITS)
def test_a_row_that_is_no_whole_blocks_stays_plain(weights: str) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=72, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    prepare(model, weights)
    mlp = model.model.layers[0].mlp
    assert (type(mlp.down_proj), type(mlp.up_proj)) == (nn.Linear, QuantisedLinear)


@pytest.mark.parametrize("weights", BITS)
def test_gemma_keeps_its_scale_and_its_tie(weights: str) -> None:
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.2,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        expected = model(IDS % 128).logits
        prepare(model, weights)
        assert isinstance(model.model.embed_tokens, QuantisedEmbedding)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert near(model(IDS % 128).logits, expected, SHARES[weights])


def test_what_trains_or_computes_otherwise_is_left(small: Small) -> None:
    for weights in PREPARED:
        model = small()
        model.lm_head.requires_grad_(True)
        model.model.layers[0].mlp.up_proj.forward = lambda x: x
        prepare(model, weights)
        assert type(model.lm_head) is type(model.model.layers[0].mlp.up_proj) is nn.Linear
        assert type(model.model.layers[1].mlp.up_proj) is not nn.Linear


def test_plain_changes_nothing(small: Small) -> None:
    model = small()
    prepare(model, "plain")
    assert kinds(model) == {nn.Linear: 15, nn.Embedding: 1}


def test_invalid_formats_are_refused(small: Small) -> None:
    with pytest.raises(ConfigError, match="invalid weights 'int3'"):
        prepare(small(), "int3")  # type: ignore[arg-type]
    for weights in BITS:
        with pytest.raises(ConfigError, match="float16 on cpu"):
            prepare(small(torch.float16), weights)
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2)).requires_grad_(False)
        with pytest.raises(ConfigError, match=r"outside nn\.Linear"):
            prepare(gpt2, weights)


@pytest.mark.parametrize("weights", BITS)
def test_a_weight_that_is_not_finite_is_refused_by_name(small: Small, weights: str) -> None:
    model = small()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(BaseModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are NaN or Inf"):
        prepare(model, weights)


# ---- what it computes


@pytest.mark.parametrize(("weights", "share"), [("packed", 1e-5), *SHARES.items()])
def test_load_prepares_and_keeps_the_fingerprint(tiny_folder: Path, small: Small, weights: str, share: float) -> None:
    small().save_pretrained(tiny_folder)
    plain = Base.load(tiny_folder, dtype="float32", device="cpu")
    base = Base.load(tiny_folder, dtype="float32", device="cpu", weights=weights)
    assert base.fingerprint == plain.fingerprint
    assert type(base.model.lm_head) is not nn.Linear
    assert near(base.model(IDS).logits, plain.model(IDS).logits, share)
    shared = shared_copy(base.model)
    assert {id(each) for each in shared.parameters()} == {id(each) for each in base.model.parameters()}
    with torch.no_grad():
        assert torch.equal(shared(IDS).logits, base.model(IDS).logits)


def test_a_packed_model_is_saved_as_the_plain_one(small: Small, tmp_path: Path) -> None:
    for tied in (False, True):
        model, plain = small(tied=tied), small(tied=tied)
        prepare(model, "packed")
        model.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("weights", BITS)
def test_a_quantised_model_is_saved_with_plain_weights(small: Small, tmp_path: Path, weights: str) -> None:
    model, plain = pair(small, weights)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, plain(IDS).logits)


# ---- adapters on it


@pytest.mark.parametrize("weights", PREPARED)
def test_a_mixed_batch_is_each_row_alone(small: Small, weights: str) -> None:
    model = small()
    prepare(model, weights)
    base = model(IDS).logits
    bank = Bank(model)
    filled(bank, "a", LoraConfig(r=4), seed=1)
    filled(bank, "b", LoraConfig(r=2, target_modules=["q_proj", "lm_head", "embed_tokens"]), seed=2)
    entries = ["a", None, {"a": 0.5, "b": 2.0}, "b"]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, base)
        with bank.route(entries):
            mixed = model(IDS).logits
        for row, entry in enumerate(entries):
            with bank.route(entry):
                alone = model(IDS[row : row + 1]).logits[0]
            assert near(mixed[row], alone, 1e-5)
    bank.detach()
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("weights", PREPARED)
def test_an_adapter_of_peft_s_does_what_it_does_there(small: Small, tmp_path: Path, weights: str) -> None:
    model, plain = pair(small, weights)
    config = PeftConfig(r=4, target_modules=["q_proj", "up_proj", "lm_head"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(plain, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    bank = Bank(model)
    name = bank.load(tmp_path, "theirs")
    with torch.no_grad():
        expected = peft_model(IDS).logits
        with bank.route(name):
            assert near(model(IDS).logits, expected, 1e-5)
        bank.detach()
        if weights == "packed":  # PEFT runs on it too; of int8 it would ask a state_dict
            assert near(PeftModel.from_pretrained(model, tmp_path)(IDS).logits, expected, 1e-5)


@pytest.mark.parametrize("weights", PREPARED)
def test_adapters_train_on_it_as_on_the_plain_one(small: Small, weights: str) -> None:
    model, plain = pair(small, weights)
    gradients = []
    for each in (plain, model):
        bank = Bank(each)
        filled(bank, "a", LoraConfig(r=4, lora_dropout=0.0), seed=1)
        with bank.route("a"):
            each(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in bank.parameters("a")])
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients[0])
    for gradient, expected in zip(gradients[1], gradients[0], strict=True):
        assert near(gradient, expected, 1e-4)


def test_merging_into_packed_weights_and_out_again(small: Small) -> None:
    model, plain = small(), small()
    prepare(model, "packed")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    base = model(IDS).logits
    merged = []
    for each in (plain, model):
        bank = Bank(each)
        filled(bank, "a", LoraConfig(r=4), seed=1)
        bank.merge("a")
        merged.append(each(IDS).logits)
    assert near(merged[1], merged[0], 1e-5)
    bank.unmerge()
    bank.detach()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("weights", BITS)
def test_merging_into_quantised_weights_makes_them_plain(small: Small, weights: str) -> None:
    model, plain = pair(small, weights)
    base, merged = model(IDS).logits, []
    for each in (plain, model):
        bank = Bank(each)
        filled(bank, "a", LoraConfig(r=4), seed=1)
        bank.merge("a")
        merged.append(each(IDS).logits)
    assert near(merged[1], merged[0], 1e-5)
    bank.unmerge()
    bank.detach()
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("weights", PREPARED)
def test_an_adapter_s_copy_of_a_weight_is_compared_or_refused(small: Small, tmp_path: Path, weights: str) -> None:
    peft_model = get_peft_model(small(), PeftConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    peft_model.save_pretrained(tmp_path, save_embedding_layers=True)
    model = small()
    prepare(model, weights)
    bank = Bank(model)
    if weights not in BITS:
        assert bank.load(tmp_path, "a") == "a"
    else:
        with pytest.raises(AdapterError, match="differs from this base's weight by up to"):
            bank.load(tmp_path, "a")


# ---- the real base


@pytest.mark.real
@pytest.mark.parametrize(("weights", "nats"), [("int8", 0.01), ("int4", 0.2)])
def test_the_real_base_quantised(smollm2: Base, weights: str, nats: float) -> None:
    base = Base.load(SMOLLM2, dtype="float32", device="cpu", weights=weights)
    assert size(base.model) < 1.05 * BITS[weights] / 32 * size(smollm2.model)
    assert base.fingerprint == smollm2.fingerprint
    text = "".join(str(module.__doc__) for module in (pytest, torch.nn.functional, Counter, Path, dict, str))
    ids = torch.tensor([smollm2.tokenizer(text)["input_ids"][:256]])
    with torch.no_grad():
        losses = [float(each.model(input_ids=ids, labels=ids).loss) for each in (smollm2, base)]
    assert abs(losses[1] - losses[0]) < nats
