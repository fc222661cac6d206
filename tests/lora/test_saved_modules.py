"""Heads that adapters bring: PEFT's modules_to_save, per row of a batch, with different numbers of labels."""

import pickle
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.classifiers import FAMILIES, SHARED, SIZES, make, wrapped
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from loradeck import Adapter, AdapterStore, Bank, Base, LoraConfig, generate
from loradeck.base.text import encode
from loradeck.errors import AdapterError, ConfigError, RouteError, TargetError, UnsupportedError
from loradeck.sampling import SamplingParams
from loradeck.serve.engine import Engine

# PEFT asks for an attribute of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
IDS = torch.tensor([[5, 9, 33, 7, 0, 0], [8, 2, 90, 41, 17, 3], [250, 4, 6, 0, 0, 0]])
MASK = (IDS != 0).long()


@pytest.fixture(params=[name for name in FAMILIES if name not in SHARED])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["classify", "tokens"])
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, task: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The files of a base without a head."""
    model = make(family, task, 2, 1)
    getattr(model, model.base_model_prefix).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def base(folder: Path, task: str) -> Base:
    return Base.load(folder, dtype="float32", device="cpu", task=task)


def logits(model: torch.nn.Module, rows: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=rows, attention_mask=(rows != 0).long()).logits


def close(ours: Tensor, theirs: Tensor) -> bool:
    seen = MASK.bool() if theirs.dim() == 3 else torch.ones(len(IDS), dtype=torch.bool)
    width = theirs.shape[-1]
    return (
        bool((ours[..., :width] - theirs)[seen].abs().max() <= 1e-5 * theirs[seen].abs().max())
        and bool((ours[..., width:] == -torch.inf).all())
    )  # fmt: skip


def test_rows_of_classifiers_of_peft_with_other_numbers_of_labels(
    family: str, task: str, base: Base, tmp_path: Path
) -> None:
    bank = Bank(base.model)
    theirs = {}
    for seed, labels in enumerate((3, 5, 2), 1):
        model = wrapped(family, task, labels, seed)
        model.save_pretrained(str(tmp_path / f"a{labels}"))
        bank.load(tmp_path / f"a{labels}", any_base=True)
        theirs[f"a{labels}"] = logits(model)
    for name in theirs:
        with bank.route(name):
            assert close(logits(base.model), theirs[name])
    names = [*theirs]
    with bank.route(names):
        mixed = logits(base.model)
    assert mixed.shape[-1] == 5
    for row, name in enumerate(names):
        alone = theirs[name].clone()
        expected = mixed.clone()
        expected[:] = torch.nn.functional.pad(alone, (0, 5 - alone.shape[-1]), value=-torch.inf)
        expected[row] = mixed[row]
        assert close(expected, alone)


def test_saved_here_it_is_read_by_peft(family: str, task: str, base: Base, tmp_path: Path) -> None:
    bank = Bank(base.model)
    wrapped(family, task, 3, 1).save_pretrained(str(tmp_path / "theirs"))
    bank.load(tmp_path / "theirs", any_base=True)
    with bank.route("theirs"):
        ours = logits(base.model)
    bank.save("theirs", tmp_path / "ours")
    assert (
        load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    )
    model = peft.PeftModel.from_pretrained(make(family, task, 3, 9), str(tmp_path / "ours")).eval()
    assert close(ours, logits(model))


def test_a_base_without_a_head_gives_zero_and_has_one_fingerprint(folder: Path, task: str, base: Base) -> None:
    again = Base.load(folder, dtype="float32", device="cpu", task=task)
    assert again.fingerprint == base.fingerprint
    assert base.model.missing_weights
    assert bool((logits(base.model) == 0).all())


def test_unloading_restores_the_base(family: str, task: str, base: Base, tmp_path: Path) -> None:
    before = logits(base.model)
    bank = Bank(base.model)
    wrapped(family, task, 3, 1).save_pretrained(str(tmp_path / "a"))
    bank.load(tmp_path / "a", any_base=True)
    with bank.route([None, "a", None]):
        mixed = logits(base.model)
    bank.unload("a")
    assert torch.equal(logits(base.model), before)
    assert not any("forward" in vars(module) for module in base.model.modules())
    assert torch.equal(mixed[::2, ..., :2], before[::2])


# ---- of one family


@pytest.fixture
def classifier(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Base:
    """A base that has a head of 2 labels."""
    make("roberta", "classify", 2, 1).save_pretrained(tmp_path / "whole")
    tiny_tokenizer.save_pretrained(tmp_path / "whole")
    return Base.load(tmp_path / "whole", dtype="float32", device="cpu", task="classify")


HEAD = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])


def test_a_new_head_is_trained(classifier: Base) -> None:
    bank = Bank(classifier.model)
    before = logits(classifier.model)
    weights = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    bank.add("same", HEAD, generator=torch.Generator().manual_seed(0))
    with bank.route("same"):
        assert torch.equal(logits(classifier.model), before)
    bank.add("five", HEAD, num_labels=5, generator=torch.Generator().manual_seed(0))
    assert {name for name, _ in bank["five"].named_parameters() if "classifier" in name} == {
        "classifier/dense/weight", "classifier/dense/bias", "classifier/out_proj/weight", "classifier/out_proj/bias",
    }  # fmt: skip
    optimizer = torch.optim.AdamW(bank.parameters("five"), lr=1e-2)
    targets = torch.tensor([4, 0, 2])
    losses = []
    for _ in range(60):
        with bank.route("five"):
            loss = torch.nn.functional.cross_entropy(
                classifier.model(input_ids=IDS, attention_mask=MASK).logits, targets
            )
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 10
    with bank.route([None, "five", "same"]):
        mixed = logits(classifier.model)
    assert int(mixed[1].argmax()) == 0
    assert torch.equal(mixed[0, :2], before[0])
    torch.testing.assert_close(mixed[2, :2], before[2])
    for name, value in classifier.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_trained_head_survives_a_save(classifier: Base, tmp_path: Path) -> None:
    bank = Bank(classifier.model)
    bank.add("five", HEAD, num_labels=5)
    with bank.route("five"):
        before = logits(classifier.model)
    bank.save("five", tmp_path / "five")
    bank.unload("five")
    bank.load(tmp_path / "five")
    with bank.route("five"):
        assert torch.equal(logits(classifier.model), before)
    copy = Adapter.load(tmp_path / "five", trainable=True)
    assert copy.saved == bank["five"].saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_has_a_dtype_of_its_own(dtype: torch.dtype, classifier: Base, tmp_path: Path) -> None:
    bank = Bank(classifier.model)
    for name, labels in (("a", 2), ("five", 5)):
        for parameter in bank.add(name, HEAD, num_labels=labels).parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        bank.save(name, tmp_path / name)
    mixed = {name: value.to(dtype) if name.endswith("bias") else value for name, value in _tensors(tmp_path / "five")}
    save_file(mixed, tmp_path / "five" / "adapter_model.safetensors")
    rows = ["a", "five", None]
    with bank.route(rows):
        wide = logits(classifier.model)
    with bank.route({"a": 0.5}):
        blend = logits(classifier.model)
    bank.detach()
    half = Base.load(tmp_path / "whole", dtype=dtype, device="cpu", task="classify")
    bank = Bank(half.model)
    bank.load(tmp_path / "a", any_base=True)
    bank.load(tmp_path / "five", any_base=True, trainable=True)
    assert {p.dtype for p in bank["five"].saved_module("classifier").values()} == {torch.float32}
    with bank.route(rows):
        ours = logits(half.model)
        half.model(input_ids=IDS).logits[1].sum().backward()
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), wide, rtol=0.1, atol=0.1)
    with bank.route({"a": 0.5}):
        torch.testing.assert_close(logits(half.model).float(), blend, rtol=0.1, atol=0.1)
    assert all(parameter.grad is not None for parameter in bank["five"].saved_module("classifier").values())
    bank.load(tmp_path / "five", "frozen", any_base=True)
    with bank.route("frozen"):
        assert torch.equal(logits(half.model)[1], ours[1])


def _tensors(folder: Path) -> list[tuple[str, Tensor]]:
    return [*load_file(folder / "adapter_model.safetensors").items()]


def test_blends_of_heads(classifier: Base) -> None:
    bank = Bank(classifier.model)
    for name, labels in (("a", 2), ("b", 2), ("five", 5)):
        adapter = bank.add(name, HEAD, num_labels=labels)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    base = logits(classifier.model)
    for parameter in (p for n in ("a", "b") for k, p in bank[n].named_parameters() if "lora" in k):
        torch.nn.init.zeros_(parameter)  # only the heads differ
    with bank.route("a"):
        a = logits(classifier.model)
    with bank.route("b"):
        b = logits(classifier.model)
    with bank.route({"a": 0.7, "b": 0.3}):
        torch.testing.assert_close(logits(classifier.model), base + 0.7 * (a - base) + 0.3 * (b - base))
    with bank.route([{"a": 0.5}, None, "five"]):
        assert torch.equal(logits(classifier.model)[1, :2], base[1])
    for entry in ({"five": 0.5}, {"a": 0.5, "five": 0.5}):
        with bank.route(entry), pytest.raises(RouteError, match="heads of 5 and 2 outputs cannot be blended"):
            logits(classifier.model)


def test_heads_that_do_not_fit_are_named(classifier: Base, tmp_path: Path) -> None:
    bank = Bank(classifier.model)
    wrapped("roberta", "classify", 3, 1).save_pretrained(str(tmp_path / "a"))
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.classifier."
    for change, message in {
        "lacks": "classifier has no out_proj.bias",
        "wide": r"classifier has out_proj.weight \[3, 40\], not \[2, 32\]",
        "labels": r"classifier has out_proj.weight \[3, 32\], not \[2, 32\]",
        "more": "classifier has extra.weight, which this base has not",
    }.items():
        wrong = dict(tensors)
        if change == "lacks":
            del wrong[f"{prefix}out_proj.bias"]
        elif change == "wide":
            wrong[f"{prefix}out_proj.weight"] = torch.zeros(3, 40)
        elif change == "labels":
            wrong[f"{prefix}out_proj.bias"] = torch.zeros(4)
        else:
            wrong[f"{prefix}extra.weight"] = torch.zeros(4)
        save_file(wrong, path)
        with pytest.raises(AdapterError, match=message):
            bank.load(tmp_path / "a", any_base=True)
    save_file(tensors, path)
    bank.load(tmp_path / "a", any_base=True)
    with pytest.raises(TargetError, match=r"modules_to_save .* match no module"):
        bank.add("x", LoraConfig(modules_to_save=["score"]))


def test_a_neighbour_that_is_nan_changes_no_other_row(classifier: Base) -> None:
    bank = Bank(classifier.model)
    for name, labels in (("good", 3), ("bad", 5)):
        bank.add(name, HEAD, num_labels=labels)
    with bank.route(["good", "good", None]):
        before = logits(classifier.model)
    bank["bad"].get_parameter("classifier/dense/weight").data.fill_(torch.nan)
    with bank.route(["good", "bad", None]):
        after = logits(classifier.model)
    torch.testing.assert_close(after[::2, :3], before[::2], rtol=1e-6, atol=1e-7)
    assert bool(after[1].isnan().all())


@pytest.mark.parametrize(("family", "task"), [("bert", "classify")], indirect=True)
def test_an_adapter_without_a_head_does_not_fit_a_base_without_one(base: Base) -> None:
    pairs = {"bert.encoder.layer.0.attention.self.query": (torch.zeros(2, 32), torch.zeros(32, 2))}
    with pytest.raises(AdapterError) as caught:
        Bank(base.model).add("x", Adapter.of(LoraConfig(r=2), pairs))
    assert caught.value.message == "This adapter does not fit this base"
    assert caught.value.problems == tuple(
        f"classifier.{name} is neither in the base nor in the adapter" for name in ("bias", "weight")
    )


def test_what_neither_the_base_nor_the_adapter_has_is_named(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make("deberta", "classify", 2, 1)
    model.deberta.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base = Base.load(tmp_path / "base", dtype="float32", device="cpu", task="classify")
    bank = Bank(base.model)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"])  # the pooler stays random
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(AdapterError, match=r"pooler.dense.bias is neither in the base nor in the adapter"):
        bank.load(tmp_path / "a", any_base=True)
    with pytest.raises(TargetError, match=r"the base lacks pooler.dense.bias, pooler.dense.weight"):
        bank.add("x", LoraConfig(target_modules=["query_proj"], modules_to_save=["classifier"]))
    bank.add("x", LoraConfig(target_modules=["query_proj"], modules_to_save=["classifier", "pooler"]), num_labels=3)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_with_a_head_of_its_own(
    tied: bool, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from transformers import LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)

    def fresh() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    fresh().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        fresh(),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    )
    torch.manual_seed(1)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    model.eval().save_pretrained(str(tmp_path / "a"))
    base = Base.load(tmp_path / "base", dtype="float32", device="cpu", weights="blocks")
    bank = Bank(base.model)
    before = logits(base.model)
    bank.load(tmp_path / "a", any_base=True)
    with bank.route(["a", None, "a"]):
        mixed = logits(base.model)
    theirs = logits(model)
    torch.testing.assert_close(mixed[1], before[1])
    seen = MASK[::2].bool()
    torch.testing.assert_close(mixed[::2][seen], theirs[::2][seen], rtol=1e-4, atol=1e-4)


def test_a_merge_takes_the_head_too(classifier: Base, tmp_path: Path) -> None:
    bank = Bank(classifier.model)
    for name, labels in (("a", 2), ("five", 5)):
        adapter = bank.add(name, HEAD, num_labels=labels)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    before = logits(classifier.model)
    state = {name: value.clone() for name, value in classifier.model.state_dict().items()}
    for entry in ("five", "a", {"a": 0.5}):
        with bank.route(entry):
            routed = logits(classifier.model)
        bank.merge(entry)
        if isinstance(entry, str):
            torch.testing.assert_close(logits(classifier.model), routed, rtol=1e-5, atol=1e-5)
            classifier.model.save_pretrained(tmp_path / entry)
            merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / entry).eval()
            assert torch.equal(logits(merged), logits(classifier.model))
        bank.unmerge()
        assert torch.equal(logits(classifier.model), before)
        assert classifier.model.config.num_labels == 2
    for name, value in classifier.model.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(UnsupportedError, match="heads with different numbers of labels have no blend"):
        bank.merge({"five": 0.5})
    with pytest.raises(UnsupportedError, match="an adapter replaces classifier"):
        bank.combine({"a": 1.0, "five": 1.0}, name="both")


def test_a_module_of_several_inputs_is_merged_only(tiny_folder: Path, tmp_path: Path) -> None:
    base = Base.load(tiny_folder, dtype="float32", device="cpu")
    bank = Bank(base.model)
    adapter = bank.add("a", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1"]))
    torch.nn.init.normal_(adapter.saved_module("model.layers.1")["mlp.up_proj.weight"])
    before = logits(base.model)
    with bank.route(["a", None, "a"]), pytest.raises(RouteError, match=r"layers.1 has several inputs, .*\nMerge"):
        logits(base.model)
    bank.merge("a")
    assert not torch.allclose(logits(base.model), before)
    bank.unmerge()
    assert torch.equal(logits(base.model), before)


def test_a_copy_of_a_model_has_its_adapters(classifier: Base) -> None:
    bank = Bank(classifier.model)
    for name, labels in (("a", 2), ("five", 5)):
        for parameter in bank.add(name, HEAD, num_labels=labels).parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    with bank.route(["a", "five", None]):
        before = logits(classifier.model)
    for copied in deepcopy((classifier.model, bank)), pickle.loads(pickle.dumps((classifier.model, bank))):
        model, copy = copied
        with copy.route(["a", "five", None]):
            assert torch.equal(logits(model), before)
            torch.nn.init.zeros_(copy["five"].saved_module("classifier")["out_proj.weight"])
            assert not torch.equal(logits(model), before)
        copy.detach()
        assert not any("forward" in vars(module) for module in model.modules())
    with bank.route(["a", "five", None]):
        assert torch.equal(logits(classifier.model), before)


def test_a_classifier_generates_no_text(classifier: Base) -> None:
    for use in (lambda: Engine(classifier), lambda: generate(classifier, None, ["hi"])):
        with pytest.raises(ConfigError, match="whole was loaded for the task classify, so it generates no text"):
            use()
    with pytest.raises(ConfigError, match="unknown task 'answer'"):
        Base.load("nowhere", task="answer")  # type: ignore[arg-type]


def test_an_engine_serves_a_language_model_with_a_head_of_an_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    base = Base.load(tiny_folder, dtype="float32", device="cpu", weights="blocks")
    store = AdapterStore(tmp_path / "store")
    bank = Bank(base.model)
    adapter = bank.add("poet", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    expected = generate(base, bank, ["one", "two"], ["poet", None], max_new_tokens=12)
    store.publish("poet", adapter)
    bank.detach()
    with Engine(base, store) as engine:
        running = [
            engine.submit(encode(base.tokenizer, prompt), entry, SamplingParams(temperature=0, max_tokens=12))
            for prompt, entry in (("one", "poet"), ("two", None))
        ]
        assert [each.text() for each in running] == expected
