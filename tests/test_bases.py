"""What each family of bases can do, found by trying it with tiny models: the tables of docs/adapters.md."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tests import classifiers, decoders, gguf_files
from transformers import AutoTokenizer, PreTrainedModel

from loradeck import AdapterStore, Bank, Base, LoraConfig, conversion, generate
from loradeck.errors import BaseModelError, LoradeckError
from loradeck.gguf.model import Merge, Model, export
from loradeck.lora.targets import stacked_weights
from loradeck.runner.native_runner import NativeRunner
from loradeck.sampling import SamplingParams
from loradeck.serve.engine import Engine
from loradeck.serve.pooling_engine import PoolingEngine
from loradeck.train.config import TrainConfig
from loradeck.train.recipe import JobRecipe, RunRecipe
from loradeck.train.run import Run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
DECODERS: dict[str, Callable[[], PreTrainedModel]] = {}
"""The first model of each kind, by its model_type: those that llama.cpp has words for come first."""
for name, config in gguf_files.CONFIGS.items():
    DECODERS.setdefault(config().model_type, partial(gguf_files.model_of, name))
for kind, settings, *_ in [*decoders.MODELS.values(), *decoders.REFUSED.values()]:
    sizes = {**decoders.SIZES, **settings, "vocab_size": gguf_files.SHAPE["vocab_size"]}
    DECODERS.setdefault(kind, partial(decoders.build, kind, sizes))
PROMPT = [5, 9, 33, 7]
REFUSAL = re.compile(r"cannot export for architecture|lacks weights|which gguf has no place for")
TASKS = ("classify", "tokens", "reward", "embed")
RECORDS = {
    "generate": [{"prompt": "Hi", "completion": "Ahoy!"}],
    "classify": [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}],
    "tokens": [{"tokens": ["in", "Rome"], "tags": ["O", "PLACE"]}],
    "reward": [{"prompt": "Hi", "chosen": "Ahoy!", "rejected": "No"}],
}


@pytest.fixture
def saved(bpe_folder: Path, tmp_path: Path) -> Callable[[PreTrainedModel], Path]:
    """Return a function that saves a model with a tokenizer, and returns its folder."""

    def saved(model: PreTrainedModel) -> Path:
        model.save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(bpe_folder).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return saved


def table(head: str) -> dict[str, list[str]]:
    """Return the rows of a table of the page, by the name that each begins with."""
    page = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    _, _, text = page.partition(f"\n{head}")
    rows = [line.strip("| ").split(" | ") for line in text.partition("\n\n")[0].splitlines()[2:]]
    found = {row[0].strip("`"): row for row in rows}
    assert len(found) == len(rows)
    return found


def trained(base: Base, task: str, folder: Path) -> Path:
    """Train a new adapter for one step; return its folder."""
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[task]))
    job = JobRecipe(name="new", data=str(data), lora=LoraConfig(r=2), train=TrainConfig(max_steps=1, learning_rate=0.1))
    run = Run(RunRecipe(base=base.source, task=task, jobs=(job,)), folder / f"run-{task}", base)
    run.begin()
    run.train()
    assert run.trainer.jobs["new"].progress.step == 1
    run.bank.detach()
    return run.adapter_folder("new")


def served(base: Base, adapter: Path) -> str:
    """Return what computes an engine's steps on a base, for rows of an adapter too."""
    store = AdapterStore(adapter.parent / "store")
    store.publish("new", adapter)
    try:
        with Engine(base, store) as engine:
            answers = engine.generate([PROMPT] * 2, ["new", None], SamplingParams(max_tokens=2, ignore_eos=True))
            assert [len([*answer]) for answer in answers] == [2, 2]
            return "compiled step" if isinstance(engine._runner, NativeRunner) else "transformers' modules"
    except BaseModelError as error:
        if "cannot be served" not in str(error):
            raise
    bank = Bank(base.model)
    bank.load(adapter)
    assert len(generate(base, bank, [PROMPT] * 2, ["new", None], max_new_tokens=2)) == 2
    return "no: `generate` and `chat` do"


def exported(folder: Path, adapter: Path, place: Path) -> list[str]:
    """Return what becomes a file of llama.cpp, the base as a model or its adapter; the rest is refused by name."""
    writers = {
        "model": lambda: export(Model.open(str(folder)), Merge(), place / "model.gguf", "f32"),
        "adapter": lambda: conversion.convert(adapter, place / "adapter.gguf", to="gguf", base=folder),
    }
    done = []
    for name, write in writers.items():
        try:
            write()
        except LoradeckError as error:
            if not REFUSAL.search(str(error)):
                raise
        else:
            done.append(name)
    return done


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_does_what_the_table_says(
    kind: str, saved: Callable[[PreTrainedModel], Path], tmp_path: Path
) -> None:
    folder = saved(DECODERS[kind]())
    base = Base.load(folder, dtype="float32", device="cpu")
    adapter = trained(base, "generate", tmp_path)
    learned = "yes, but for its experts" if stacked_weights(base.model) else "yes"
    files = exported(folder, adapter, tmp_path)
    row = [f"`{kind}`", f"`{type(base.model).__name__}`", learned, served(base, adapter), ", ".join(files) or "no"]
    assert table("| model type |")[kind] == row


@pytest.mark.parametrize("family", classifiers.FAMILIES)
def test_a_classifier_or_encoder_does_what_the_table_says(
    family: str, saved: Callable[[PreTrainedModel], Path], tmp_path: Path
) -> None:
    names, learned, pooled, files = {}, [], [], []
    for task in TASKS:
        folder = saved(classifiers.make(family, "classify" if task == "reward" else task, 2 - (task == "reward"), 1))
        base = Base.load(folder, dtype="float32", device="cpu", task=task)  # type: ignore[arg-type]
        names[type(base.model).__name__] = base.model.config.model_type
        if task in RECORDS:
            adapter = trained(base, task, tmp_path)
            learned.append(task)
        else:
            adapter = tmp_path / task
            classifiers.wrapped(family, task, 2, 1).save_pretrained(str(adapter))
        store = AdapterStore(tmp_path / f"store-{task}")
        store.publish("new", adapter)
        with PoolingEngine(base, store) as engine:
            results = [engine.submit([PROMPT], name)[0].result() for name in ("new", None)]
        assert not torch.equal(*results)
        pooled.append(task)
        files += [f"{each} ({task})" for each in exported(folder, adapter, tmp_path / f"store-{task}")]
    (kind,) = {*names.values()}
    classes = ", ".join(f"`{name}`" for name in names)
    row = [f"`{kind}`", classes, ", ".join(learned), ", ".join(pooled), ", ".join(files) or "no"]
    assert table("| encoder |")[kind] == row


def test_the_tables_have_each_family_once() -> None:
    assert [*table("| model type |")] == [*DECODERS]
    kinds = [config().model_type for config in classifiers.FAMILIES.values()]
    assert [*table("| encoder |")] == [*dict.fromkeys(kinds)]
