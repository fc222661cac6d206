"""Adapters with tokens beyond the base's: PEFT on the resized base is the judge, alone and in one mixed batch."""

import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.classifiers import make
from tests.multimodal import text_logits, whole
from tests.resized import ADDED, BLUE, FAMILIES, GREEN, KINDS, RED, ROWS, adapted, save, save_base
from tests.resized import load as load_theirs
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from loradeck import Adapter, Bank, Base, LoraConfig
from loradeck.errors import AdapterError, RouteError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # PEFT asks for an attribute of transformers by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
IDS = torch.tensor([[5, GREEN, 33, BLUE, 7, 8], [8, 2, RED, 41, GREEN, 3]])
OLD = torch.tensor([[9, 4, 33, 40, 7, 8]])
TENSORS = "adapter_model.safetensors"
CASES = [
    (family, tied, kind)
    for family in FAMILIES
    for tied in (False, True)
    for kind in KINDS
    if (family != "gemma2" or (tied and kind in ("copies", "pairs", "both trained"))) and ("tied" not in kind or tied)
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}{', tied' * case[1]}: {case[2]}")
def case(request: pytest.FixtureRequest) -> tuple[str, bool, str]:
    return request.param


@pytest.fixture
def kind(case: tuple[str, bool, str]) -> str:
    return case[2]


@pytest.fixture
def source(case: tuple[str, bool, str], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_base(tmp_path / "base", case[0], tied=case[1], tokenizer=tiny_tokenizer)


def load(source: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source).eval().requires_grad_(False)
    return model


def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def close(ours: Tensor, theirs: Tensor) -> bool:
    width = min(ours.shape[-1], theirs.shape[-1])
    largest = theirs.abs().max()
    return ours.shape[-1] >= ROWS and bool((ours[..., :width] - theirs[..., :width]).abs().max() <= 1e-5 * largest)


def fill(adapter: Adapter, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_logits_are_those_of_peft_alone_and_in_a_mixed_batch(source: Path, kind: str, tmp_path: Path) -> None:
    theirs = adapted(source, kind)
    folder = save(theirs, tmp_path / "colours")
    bank = Bank(load(source))
    before = logits(bank.model, OLD)
    bank.add("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    fill(bank["plain"])
    with bank.route("plain"):
        plain = logits(bank.model, OLD)
    assert bank.load(folder) == "colours"
    with bank.route("colours"):
        ours = logits(bank.model)
    expected = logits(theirs)
    head = "head" in "".join(load_file(folder / TENSORS)) or source_is_tied(source)
    assert ours.shape[-1] == (ROWS + 2 if head else ROWS)
    assert close(ours, expected)
    with bank.route(["colours", None, "colours", "plain"]):
        mixed = logits(bank.model, torch.cat([IDS[:1], OLD, IDS[1:], OLD]))
    assert close(mixed[:3:2], expected)
    assert close(mixed[1:2], before)
    assert close(mixed[3:], plain)
    assert not close(plain, before)
    assert_no_more_tokens(mixed[1::2, :, ROWS:], source)


def source_is_tied(source: Path) -> bool:
    return bool(load(source).config.tie_word_embeddings)


def assert_no_more_tokens(beyond: Tensor, source: Path) -> None:
    """Logits of another row's tokens are the lowest; where a model caps its logits, the cap is."""
    cap = getattr(load(source).config, "final_logit_softcapping", None)
    assert bool((beyond == (-torch.inf if cap is None else -cap)).all())


def test_saved_here_it_is_the_file_that_peft_wrote_and_reads(source: Path, kind: str, tmp_path: Path) -> None:
    folder = save(adapted(source, kind), tmp_path / "colours")
    bank = Bank(load(source))
    bank.load(folder)
    with bank.route("colours"):
        ours = logits(bank.model)
    bank.save("colours", tmp_path / "ours")
    written, read = load_file(tmp_path / "ours" / TENSORS), load_file(folder / TENSORS)
    assert {key for key in read if "_module" not in key and "modules_" not in key} == written.keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in written.items())
    assert close(ours, logits(load_theirs(source, tmp_path / "ours")))


def test_merged_it_is_the_model_that_peft_merges(source: Path, kind: str, tmp_path: Path) -> None:
    theirs = adapted(source, kind)
    folder = save(theirs, tmp_path / "colours")
    bank = Bank(load(source))
    bank.load(folder)
    before = dict(bank.model.named_parameters(remove_duplicate=False))
    if kind == "pair of the embedding" and not source_is_tied(source):
        with pytest.raises(UnsupportedError, match="none of the head"):
            bank.merge("colours")
    else:
        bank.merge("colours")
        assert bank.model.config.get_text_config().vocab_size == ROWS + 2
        merged = logits(bank.model)
        assert close(merged, logits(theirs))
        if "pair" not in kind or not source_is_tied(source):  # PEFT adds the pairs of a tied weight to both its uses
            assert close(merged, logits(theirs.merge_and_unload()))
        bank.unmerge()
        assert bank.model.config.get_text_config().vocab_size == ROWS
    after = dict(bank.model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())


# ---- of one family


@pytest.fixture
def make_base(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[bool], Path]:
    return lambda tied: save_base(tmp_path / f"base{tied}", "llama", tied=tied, tokenizer=tiny_tokenizer)


@pytest.fixture
def llama(make_base: Callable[[bool], Path]) -> Path:
    return make_base(False)


@pytest.fixture
def colours(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an adapter of a kind for the base that is not tied."""

    def colours(kind: str = "copies", seed: int = 1, name: str = "colours") -> Path:
        return save(adapted(llama, kind, seed=seed), tmp_path / name)

    return colours


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_new_rows_are_kept(make_base: Callable[[bool], Path], tmp_path: Path, tied: bool) -> None:
    source = make_base(tied)
    bank = Bank(load(source))
    bank.load(save(adapted(source, "copies"), tmp_path / "copies"))
    pairs = sum(a.numel() + b.numel() for a, b in map(bank["copies"].pair, bank["copies"].sites))
    assert bank["copies"].nbytes == 4 * (pairs + 2 * 64 * 2)  # PEFT copies a tied weight twice
    trained = adapted(source, "both trained")
    with torch.no_grad():  # as where a mask lets only the new rows train
        for module in (trained.get_input_embeddings(), trained.get_output_embeddings()):
            module.modules_to_save["default"].weight[:ROWS] = module.original_module.weight[:ROWS]
    bank.load(save(trained, tmp_path / "rows"))
    assert bank["rows"].nbytes == bank["copies"].nbytes
    with bank.route("rows"):
        assert close(logits(bank.model), logits(trained))


def test_rows_up_to_a_multiple(llama: Path, tmp_path: Path) -> None:
    """An embedding that is padded has more rows than there are tokens."""
    theirs = adapted(llama, "copies", pad_to_multiple_of=64)
    bank = Bank(load(llama))
    bank.load(save(theirs, tmp_path / "padded"))
    bank.load(save(adapted(llama, "pairs", seed=2), tmp_path / "pairs"))
    assert (bank["padded"].added_tokens, bank["pairs"].added_tokens) == (320 - ROWS, 2)
    with bank.route(["padded", "pairs"]):
        mixed = logits(bank.model)
    assert mixed.shape[-1] == 320
    assert close(mixed[:1], logits(theirs)[:1])
    assert bool((mixed[1, :, ROWS + 2 :] == -torch.inf).all())
    assert bool(mixed[1, :, : ROWS + 2].isfinite().all())


def test_tokens_within_the_base_need_no_rows(llama: Path, tmp_path: Path) -> None:
    theirs = adapted(llama, "copies", rows=ROWS)
    bank = Bank(load(llama))
    bank.load(save(theirs, tmp_path / "within"))
    assert bank["within"].added_tokens == 0
    ids = IDS.clamp(max=ROWS - 1)
    with bank.route("within"):
        assert close(logits(bank.model, ids), logits(theirs, ids))


def test_segments_of_a_packed_row(llama: Path, colours: Callable[..., Path]) -> None:
    bank = Bank(load(llama))
    bank.load(colours("pairs"))
    with bank.route("colours"):
        alone = logits(bank.model, IDS[:1, :4])
    row = torch.cat([IDS[:1, :4], OLD], -1)
    with bank.route(["colours", None], lengths=[4, 6], logits_to_keep=[2, 1]), torch.no_grad():
        packed = bank.model(input_ids=row, logits_to_keep=torch.tensor([2, 3, 9])).logits
    assert close(packed[:, :2], alone[:, 2:4])
    assert bool((packed[0, 2, ROWS:] == -torch.inf).all())
    assert bool(packed[0, 2, :ROWS].isfinite().all())


@pytest.mark.parametrize("entry", [None, "plain"])
def test_other_rows_have_no_such_token(llama: Path, colours: Callable[..., Path], entry: str | None) -> None:
    bank = Bank(load(llama))
    bank.load(colours())
    bank.add("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    with (
        pytest.raises(RouteError, match=f"token id {GREEN} is beyond the {ROWS} tokens"),
        bank.route([entry, "colours"]),
    ):
        logits(bank.model)
    with pytest.raises(RouteError, match=f"token id {ROWS + 2} is beyond the {ROWS + 2} tokens"), bank.route("colours"):
        logits(bank.model, IDS + 1)


def test_unloading_restores_the_base(llama: Path, colours: Callable[..., Path]) -> None:
    bank = Bank(load(llama))
    before = logits(bank.model, OLD)
    bank.load(colours("pairs"))
    bank.unload("colours")
    assert torch.equal(logits(bank.model, OLD), before)
    assert not any("forward" in vars(module) for module in bank.model.modules())


def test_a_blend_has_the_mean_rows_of_all_its_adapters(llama: Path, colours: Callable[..., Path]) -> None:
    """At the base's tokens the law of updates holds; the rows beyond are those that a base would have as their mean."""
    bank = Bank(load(llama))
    for seed, name in enumerate(("one", "two"), 1):
        bank.load(colours("pairs", seed, name))
    weights = {"one": 0.9, "two": 0.3}
    with bank.route(weights):
        blend = logits(bank.model)
    mean = load(llama)
    mean.resize_token_embeddings(ROWS + 2, mean_resizing=False)
    files = {name: load_file(bank_folder / TENSORS) for name, bank_folder in ((n, llama.parent / n) for n in weights)}
    for path in ("model.embed_tokens", "lm_head"):
        rows = [files[name][f"base_model.model.{path}.base_layer.weight"][ROWS:] for name in weights]
        with torch.no_grad():
            mean.get_submodule(path).weight[ROWS:] = 0.75 * rows[0] + 0.25 * rows[1]
    judge = Bank(mean)
    for name in weights:
        tensors = {key: value for key, value in files[name].items() if "base_layer" not in key}
        save_file(tensors, llama.parent / name / TENSORS, {"format": "pt"})
        judge.load(llama.parent / name)
    with judge.route(weights):
        assert close(blend, logits(mean))


def test_a_blend_has_the_tokens_that_all_its_adapters_have(llama: Path, tmp_path: Path) -> None:
    bank = Bank(load(llama))
    bank.load(save(adapted(llama, "copies", pad_to_multiple_of=64), tmp_path / "padded"))
    bank.load(save(adapted(llama, "pairs", seed=2), tmp_path / "pairs"))
    bank.load(save(adapted(llama, "both trained", seed=3), tmp_path / "trained"))
    for weights in ({"padded": 0.5, "pairs": 0.5}, {"trained": 0.5, "padded": -0.2, "pairs": 0.4}):
        with bank.route([weights, {"padded": 1.0}]):
            mixed = logits(bank.model)
        with bank.route(weights):
            blend = logits(bank.model)
        assert blend.shape[-1] == ROWS + 2
        assert close(mixed[:1], blend[:1])
        bank.merge(weights)
        assert close(blend, logits(bank.model))
        bank.unmerge()


@pytest.mark.parametrize("kind", ["copies", "both trained"])
def test_a_blend_at_one_weight_keeps_the_rows_and_scales_the_updates(
    llama: Path, colours: Callable[..., Path], kind: str
) -> None:
    bank = Bank(load(llama))
    bank.load(colours(kind))
    with bank.route({"colours": 0.5}):
        half = logits(bank.model)
    bank.merge({"colours": 0.5})
    assert close(half, logits(bank.model))


@pytest.mark.parametrize("other", [{"plain": 0.5}, {"opposite": -1.0}])
def test_a_blend_with_one_that_lacks_them_has_the_base_tokens(
    llama: Path, colours: Callable[..., Path], other: dict[str, float]
) -> None:
    bank = Bank(load(llama))
    bank.load(colours())
    bank.load(colours(seed=2, name="opposite"))
    bank.add("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    with bank.route({"colours": 1.0, **other}):
        assert logits(bank.model, OLD).shape[-1] == ROWS
        with pytest.raises(RouteError, match="beyond the"):
            logits(bank.model)


def test_such_adapters_are_not_combined(llama: Path, colours: Callable[..., Path]) -> None:
    bank = Bank(load(llama))
    bank.load(colours())
    bank.load(colours(seed=2, name="other"))
    with pytest.raises(UnsupportedError, match="tokens that its base has not"):
        bank.combine({"colours": 0.5, "other": 0.5}, name="both")


# ---- training on


@pytest.mark.parametrize("kind", ["both trained", "copies", "pairs", "embedding trained"])
def test_it_trains_on_as_with_peft(llama: Path, tmp_path: Path, kind: str) -> None:
    folder = save(adapted(llama, kind), tmp_path / "colours")
    bank = Bank(load(llama))
    bank.load(folder, trainable=True)
    theirs = load_theirs(llama, folder, trainable=True)
    runs = []
    for each, own in (
        (bank.model, [*bank.parameters("colours")]),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.SGD([p for p in own if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(3):
            with bank.route("colours"):
                output = each(input_ids=IDS).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(output.flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)
    assert runs[0][0] - runs[0][-1] > 1e-2
    bank.save("colours", tmp_path / "on")
    before, after = (load_file(each / TENSORS) for each in (folder, tmp_path / "on"))
    for key in after:
        frozen = "lora_" not in key and not (kind == "both trained" or (kind == "embedding trained" and "embed" in key))
        assert torch.equal(before[key], after[key]) == frozen, key
    with bank.route("colours"):
        assert close(logits(bank.model), logits(load_theirs(llama, tmp_path / "on")))


# ---- what is refused


def refused(source: Path, folder: Path, match: str) -> None:
    bank = Bank(load(source))
    with pytest.raises(AdapterError, match=match):
        bank.load(folder)
    assert bank.names() == []


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    tensors = change(load_file(folder / TENSORS))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / TENSORS, {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["copies", "both trained", "pairs"])
def test_fewer_rows_are_refused(llama: Path, tmp_path: Path, kind: str) -> None:
    folder = save(adapted(llama, kind, rows=ROWS - 9), tmp_path / "fewer")
    refused(llama, folder, f"has {ROWS - 9} rows, fewer than the {ROWS} of .* made smaller is not supported")


def test_rows_of_the_head_alone_are_refused(llama: Path, colours: Callable[..., Path]) -> None:
    for kind in ("copies", "both trained"):
        folder = edit(colours(kind), lambda tensors: {k: t for k, t in tensors.items() if "embed_tokens" not in k})
        refused(llama, folder, "lm_head has rows for tokens that model.embed_tokens has none for")


@pytest.mark.parametrize("lacking", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("kind", ["copies", "pairs"])
def test_one_copy_of_a_tied_weight_stands_for_both(
    make_base: Callable[[bool], Path], tmp_path: Path, kind: str, lacking: str
) -> None:
    source = make_base(True)
    theirs = adapted(source, kind)

    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors.items() if lacking not in key or "lora_" in key}

    folder = edit(save(theirs, tmp_path / "colours"), without)
    bank = Bank(load(source))
    bank.load(folder)
    with bank.route("colours"):
        assert close(logits(bank.model), logits(theirs))
    bank.save("colours", tmp_path / "ours")
    assert load_file(tmp_path / "ours" / TENSORS).keys() == load_file(folder / TENSORS).keys()
    bank.merge("colours")
    assert close(logits(bank.model), logits(theirs))


def test_a_pair_without_the_rows_is_refused(llama: Path, colours: Callable[..., Path]) -> None:
    folder = edit(colours("pairs"), lambda tensors: {k: t for k, t in tensors.items() if "base_layer" not in k})
    refused(
        llama, folder, "262 rows of lm_head in the adapter and 260 in this base, and the file lacks the weight of those"
    )


def test_different_numbers_of_rows_are_refused(llama: Path, colours: Callable[..., Path]) -> None:
    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor[:-1] if "lm_head.base_layer" in key else tensor for key, tensor in tensors.items()}

    refused(llama, edit(colours("pairs"), cut), "lm_head has different numbers of rows")


def test_rows_of_another_base_are_refused(llama: Path, colours: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor + 1e-3 if "lora_" not in key else tensor for key, tensor in tensors.items()}

    folder = edit(colours(), change)
    refused(llama, folder, "differs from this base's weight by up to 0.001")
    bank = Bank(load(llama))
    bank.load(folder, any_base=True)
    assert bank["colours"].added_tokens == len(ADDED) - 1


def test_nan_in_the_rows_is_refused(llama: Path, colours: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["base_model.model.lm_head.weight"][-1, 0] = torch.nan
        return tensors

    refused(llama, edit(colours(), change), "base_model.model.lm_head.weight holds NaN or Inf")


def test_a_quantised_base(llama: Path, tmp_path: Path) -> None:
    """Its weights are not those of the copies, so these are taken on trust; the new rows are exact."""
    theirs = adapted(llama, "copies")
    folder = save(theirs, tmp_path / "colours")
    base = Base.load(llama, dtype="float32", device="cpu", weights="int8")
    bank = Bank(base.model)
    with pytest.raises(AdapterError, match="differs from this base's weight"):
        bank.load(folder)
    bank.load(folder, any_base=True)
    with bank.route(["colours", None]):
        ours = logits(bank.model, torch.cat([IDS[:1], OLD]))
    expected = logits(theirs, IDS[:1])
    assert bool((ours[:1] - expected).abs().max() <= 0.1 * expected.abs().max())
    assert bool((ours[1, :, ROWS:] == -torch.inf).all())


def test_a_classifier_reads_them_too(tmp_path: Path) -> None:
    """A model for classes has no output head for tokens: its embedding alone is resized."""
    make("roberta", "classify", 2, 1).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make("roberta", "classify", 2, 1)
        rows = model.get_input_embeddings().num_embeddings
        model.resize_token_embeddings(rows + 2, mean_resizing=False)
        config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
        theirs = peft.get_peft_model(model, config).eval()
        theirs.save_pretrained(str(tmp_path / "colours"), save_embedding_layers=True)
    base = make("roberta", "classify", 2, 1)
    bank = Bank(base)
    bank.load(tmp_path / "colours")
    ids = torch.tensor([[5, rows, 9, rows + 1]])
    with bank.route("colours"), torch.no_grad():
        ours = base(input_ids=ids).logits
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    assert bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


def test_of_a_multimodal_base(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Its files spell the modules as the whole model has them, and so does what is written here."""
    whole("gemma3").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = whole("gemma3")
    rows = model.get_input_embeddings().num_embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(rows + 2, mean_resizing=False)
        targets = r".*language_model.*\.(q_proj|down_proj)"
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets)).eval()
        theirs.save_pretrained(str(tmp_path / "colours"), save_embedding_layers=True)
    bank = Bank(Base.load(tmp_path / "base", dtype="float32", device="cpu").model)
    bank.load(tmp_path / "colours")
    ids = torch.tensor([[5, rows, 9, rows + 1]])
    with bank.route("colours"):
        ours = logits(bank.model, ids)
    assert close_to(ours, text_logits(theirs, ids))
    bank.save("colours", tmp_path / "ours")
    written, read = (load_file(tmp_path / each / TENSORS) for each in ("ours", "colours"))
    assert all(torch.equal(tensor, read[key]) for key, tensor in written.items())


def close_to(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())
