"""A mixed batch of classifiers, each row through its own adapter and head, against the bare base and PEFT in turns.

    python -m benchmarks classify [--rounds 15] [--dtypes float32 bfloat16] [--shape BERT-base SmolLM2-135M]

The bases have random weights in these shapes, and 16 adapters of r=8 on all linear layers of the body, each with a
head of its own. PEFT is measured if it is installed.
"""

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, PretrainedConfig

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import Run, alternate, parser
from loradeck import Bank, LoraConfig
from loradeck.base.weights import shared_copy

DTYPES = ("float32", "bfloat16")
ROWS, LABELS, LENGTHS = 16, 4, (16, 64)  # rows and adapters; labels of a head; tokens of a row
ENCODER = ("query", "key", "value", "intermediate.dense", "output.dense")
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Classifier:
    """A shape: how the config is made, the linear layers of its body, and its head."""

    config: Callable[..., PretrainedConfig]
    targets: tuple[str, ...]
    head: str


# The sizes are those of config.json in google-bert/bert-base-uncased and HuggingFaceTB/SmolLM2-135M.
CLASSIFIERS: Mapping[str, Classifier] = {
    "BERT-base": Classifier(BertConfig, ENCODER, "classifier"),
    "SmolLM2-135M": Classifier(
        partial(
            LlamaConfig, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        ),
        DECODER,
        "score",
    ),
    "tiny": Classifier(
        partial(BertConfig, vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4),
        ENCODER,
        "classifier",
    ),
}  # fmt: skip
FIGURES = (
    Figure(
        f"{ROWS} adapters / bare",
        f"{ROWS} adapters: time relative to the bare base",
        "×",
        "≤ 1.3",
        headline=f"classify {ROWS} texts through {ROWS} adapters: time relative to the bare base",
    ),
    Figure("one adapter / bare", "one adapter: time relative to the bare base", "×"),
    Figure("base rows / bare", "rows without an adapter: time relative to the bare base", "×"),
    Figure(
        "PEFT in turns / loradeck",
        f"{ROWS} adapters: times faster than PEFT in turns",
        "×",
        "≥ 5",
        headline=f"classify {ROWS} texts through {ROWS} adapters: times faster than PEFT in turns",
    ),
)
SUITE = Suite(
    "classify",
    "Classification",
    f"{ROWS} rows, r=8 on all linear layers, a head of {LABELS} labels for each adapter, random weights",
    tuple(Table(dtype, (f"{dtype} {{column}}", "{row}"), FIGURES) for dtype in DTYPES),
    """
- *bare base*: transformers' own forward of the whole batch, with one head for all rows.
- *PEFT in turns*: for each adapter `set_adapter`, then a forward of its row. PEFT keeps all adapters in memory.
""",
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=15, dtypes=DTYPES)
    shapes = [shape for shape in CLASSIFIERS if shape != "tiny"]
    options.add_argument("--shape", nargs="+", choices=CLASSIFIERS, default=shapes)
    run = Run(SUITE, options, arguments)
    for shape in run.options.shape:
        for dtype in run.options.dtypes:
            model = random_classifier(shape, getattr(torch, dtype))
            with tempfile.TemporaryDirectory() as path:
                folders = saved(model, shape, Path(path))
                for length in LENGTHS:
                    run.add(f"{dtype} {shape}, {length} tokens", measure(model, folders, length, run.options.rounds))
            del model
            gc.collect()
    run.end()


def random_classifier(shape: str, dtype: torch.dtype) -> Any:
    """Return a frozen base of a shape with random weights."""
    torch.manual_seed(0)
    config = CLASSIFIERS[shape].config(num_labels=LABELS, pad_token_id=0)
    return AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval().requires_grad_(False)


def saved(model: Any, shape: str, folder: Path) -> list[Path]:
    """Save adapters of random numbers, each with a head, as folders that PEFT reads too."""
    classifier = CLASSIFIERS[shape]
    config = LoraConfig(r=8, target_modules=[*classifier.targets], modules_to_save=[classifier.head])
    bank = Bank(shared_copy(model))
    folders = [folder / f"a{number}" for number in range(ROWS)]
    generator = torch.Generator().manual_seed(0)
    for path in folders:
        adapter = bank.add(path.name, config, generator=generator)
        for parameter in adapter.parameters():
            parameter.data.normal_(std=0.02, generator=generator)
        adapter.save(path)
        bank.unload(path.name)
    bank.detach()
    return folders


@torch.inference_mode()
def measure(model: Any, folders: Sequence[Path], length: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a batch, by what its rows go through; a row for each folder."""
    names = [folder.name for folder in folders]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.vocab_size, (len(folders), length), generator=generator)
    mask = torch.ones_like(tokens)
    adapted = shared_copy(model)
    with torch.inference_mode(False):
        bank = Bank(adapted)
        for folder in folders:
            bank.load(folder)
            bank[folder.name].to(model.dtype)
        peft: Any = with_peft(model, folders) if find_spec("peft") else None

    def routed(route: Any) -> Tensor:
        with bank.route(route):
            return adapted(input_ids=tokens, attention_mask=mask).logits

    def in_turns() -> Tensor:
        logits = []
        for row, name in enumerate(names):
            peft.set_adapter(name)
            logits.append(peft(input_ids=tokens[row : row + 1], attention_mask=mask[row : row + 1]).logits)
        return torch.cat(logits)

    mixed = f"loradeck, {len(names)} adapters"
    runs: dict[str, Callable[[], Tensor]] = {
        "bare base": lambda: model(input_ids=tokens, attention_mask=mask).logits,
        "loradeck, base rows": lambda: routed([None] * len(names)),
        "loradeck, one adapter": lambda: routed(names[0]),
        mixed: lambda: routed(names),
    }
    if peft is not None:
        runs["PEFT in turns"] = in_turns
    ms = {name: 1e3 * each for name, each in alternate(runs, rounds).items()}
    figures = {
        **{f"{name} (ms)": each for name, each in ms.items()},
        f"{ROWS} adapters / bare": ms[mixed] / ms["bare base"],
        "one adapter / bare": ms["loradeck, one adapter"] / ms["bare base"],
        "base rows / bare": ms["loradeck, base rows"] / ms["bare base"],
    }
    if peft is not None:
        figures["PEFT in turns / loradeck"] = ms["PEFT in turns"] / ms[mixed]
        logits, expected = runs[mixed]().float(), in_turns().float()
        figures["largest difference from PEFT's logits, relative"] = float(
            (logits - expected).abs().max() / expected.abs().max()
        )
    return figures


def with_peft(model: Any, folders: Sequence[Path]) -> Any:
    """Return a model with these adapters, as PEFT has it, on the same weights."""
    from peft import PeftModel

    first, *others = folders
    peft = PeftModel.from_pretrained(shared_copy(model), first, adapter_name=first.name)
    for folder in others:
        peft.load_adapter(str(folder), adapter_name=folder.name)
    return peft.eval()
