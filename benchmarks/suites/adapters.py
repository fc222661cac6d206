"""Load, switch, memory and the mixed decode step, against PEFT in the same run.

    python -m benchmarks adapters [--rounds 15] [--only load memory step] [--dtypes float32 bfloat16]
    python -m benchmarks adapters --device cuda [--shape Llama-3.2-1B Llama-3.1-8B]

On SmolLM2-135M with adapters of r=8 on all linear layers (210 modules), or on bases of random weights with r=16; there
PEFT is measured if it is installed.
"""

import gc
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import CPU, Run, alternate, in_new_process, parser, seconds
from benchmarks.memory import resident
from benchmarks.models import RandomAdapters, random_model
from benchmarks.workloads import cache_name
from loradeck import Bank, Base, LoraConfig
from loradeck.base.load import SMOLLM2
from loradeck.base.weights import shared_copy

DTYPES = ("float32", "bfloat16")
PARTS = ("load", "memory", "step")
ROWS, CONTEXT = 16, 64
RESIDENT = 200
ROWS_ON_GPU, DISTINCT_ON_GPU = 32, 4  # adapters of a mixed batch, and how many of them differ: the files are large
COUNT = 100  # adapters whose memory is measured


def step_figures(rows: int, over_peft: str, over_base: str, over_base_alone: str) -> tuple[Figure, ...]:
    return (
        Figure(f"first step after a switch to {rows} new adapters (ms)"),
        Figure(f"PEFT / loradeck, {rows} adapters", f"{rows} adapters: times faster than PEFT", "×", over_peft),
        Figure("PEFT / loradeck, one adapter", "one adapter: times faster than PEFT", "×"),
        Figure(f"{rows} adapters / bare", f"{rows} adapters: time relative to the bare model", "×", over_base),
        Figure("one adapter / bare", "one adapter: time relative to the bare model", "×"),
        Figure("base rows / bare", "rows without an adapter: time relative to the bare model", "×", over_base_alone),
    )


SUITE = Suite(
    "adapters",
    "Adapters",
    "SmolLM2-135M, r=8, all linear layers (210 modules)",
    (
        Table(
            "Load and switch",
            ("load", "{row}"),
            (
                Figure("file_bytes", "an adapter's files", "bytes"),
                Figure(
                    "PEFT / loradeck",
                    "load from disk: times faster than PEFT",
                    "×",
                    "≥ 30",
                    headline="load an adapter from disk: times faster than PEFT",
                ),
                Figure("loradeck / read", "load from disk: time relative to reading the bytes", "×", "≤ 2"),
                Figure(
                    "200 resident / 1 resident", "load with 200 resident: time relative to 1 resident", "×", "≤ 1.2"
                ),
                Figure("switch, 1 resident, 16 rows of 1 (us)", "switch: a route of 16 rows, 1 resident adapter"),
                Figure(
                    "switch, 200 resident, 16 rows of 16 (us)",
                    "switch: a route of 16 rows through 16 adapters, 200 resident",
                    target="< 100",
                    headline="switch 16 rows to 16 of 200 resident adapters (the route alone)",
                ),
            ),
        ),
        Table(
            "Memory",
            ("memory {column}", "{row}"),
            (
                Figure("tensor_bytes", "an adapter's tensors", "bytes"),
                Figure("added per adapter / its bytes", "memory per adapter, relative to its tensors", "×", "≤ 1.05"),
            ),
        ),
        Table("Decode step", ("step {column}", "{row}"), step_figures(ROWS, "≥ 4", "≤ 1.6", "≤ 1.02")),
        Table(
            "Load to the GPU",
            ("load {column}", "{row}"),
            (
                Figure("file_bytes", "an adapter's files", "bytes"),
                Figure("loradeck, 1 resident (ms)", target="< 20"),
                Figure("PEFT / loradeck", "load from disk: times faster than PEFT", "×"),
                Figure("loradeck / read", "load from disk: time relative to reading the bytes", "×"),
            ),
        ),
        Table(
            "Decode step on the GPU, r=16",
            ("decode {column}", "{row}"),
            step_figures(ROWS_ON_GPU, "≥ 10", "≤ 1.15", ""),
        ),
    ),
    """
- *load*: a PEFT folder on disk (page cache warm) until it can be routed to. PEFT loads with one adapter resident, its
  best case. *read the bytes* keeps what it reads in memory, as a load must.
- *decode step*: 64 tokens of context, one new token per row, in transformers' own forward. PEFT's mixed batch is
  `adapter_names`.
- *first step after a switch*: a route to adapters that were not routed together collects all their tensors.
""",
)


def main(arguments: Sequence[str]) -> None:
    run = Run(SUITE, parser(SUITE, __doc__, rounds=15, parts=PARTS, dtypes=DTYPES, shapes=True), arguments)
    only, rounds = run.options.only, run.options.rounds
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for shape in run.options.shape:
            model = random_model(shape, run.device)
            folders = saved(model, folder / shape, ROWS_ON_GPU, DISTINCT_ON_GPU, r=16)
            run.add(f"load {shape}", load(model, folders, rounds))
            run.add(f"decode {shape}", step(model, folders, rounds))
            del model
            gc.collect()
        if not run.options.shape:
            model = Base.load(SMOLLM2, dtype="float32").model
            folders = saved(model, folder, RESIDENT, ROWS, r=8)
            if "load" in only:
                run.add("load", load(model, folders, rounds) | load_and_switch(model, folders, rounds))
            if "memory" in only:
                for dtype in DTYPES:
                    adapter = RandomAdapters(model).make(0, LoraConfig(r=8), dtype=getattr(torch, dtype))
                    run.add(f"memory {dtype}", in_new_process(memory, adapter.save(folder / dtype)))
            del model
            for dtype in run.options.dtypes if "step" in only else ():
                run.add(f"step {dtype}", step(Base.load(SMOLLM2, dtype=dtype).model, folders[:ROWS], rounds))
                gc.collect()
    run.end()


def saved(model: nn.Module, folder: Path, count: int, distinct: int, r: int) -> list[Path]:
    """Save `count` adapters as folders a000, a001, …; after the first `distinct` they are copies."""
    adapters, dtype = RandomAdapters(model), next(model.parameters()).dtype
    folders = [folder / f"a{i:03d}" for i in range(count)]
    for i, path in enumerate(folders):
        if i < distinct:
            adapters.make(i, LoraConfig(r=r), dtype=dtype).save(path)
        else:
            shutil.copytree(folders[i % distinct], path)
    return folders


def with_peft(model: Any, folders: Sequence[Path]) -> Any:
    """Return a model with these adapters, as PEFT has it, on the same weights."""
    from peft import PeftModel

    first, *others = folders
    device = str(model.device)
    peft = PeftModel.from_pretrained(shared_copy(model), first, adapter_name=first.name, torch_device=device)
    for folder in others:
        peft.load_adapter(str(folder), adapter_name=folder.name, torch_device=device)
    peft.set_adapter(first.name)
    return peft.eval()


# ---- load and switch


def load(model: Any, folders: Sequence[Path], rounds: int) -> dict[str, float]:
    """Return the milliseconds from files in the page cache to an adapter on the device, with one there already."""
    bank = Bank(shared_copy(model))
    bank.load(folders[0], "first")
    memory: list[object] = []  # fresh pages are half of a load's cost, so the bytes that are read stay as well
    runs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "read the bytes": (lambda: memory.extend(file.read_bytes() for file in folders[1].iterdir()), memory.clear),
        "loradeck, 1 resident": (lambda: bank.load(folders[1], "next"), lambda: bank.unload("next")),
    }
    if find_spec("peft"):
        peft, device = with_peft(model, folders[:1]), str(model.device)
        runs["PEFT, 1 resident"] = (
            lambda: peft.load_adapter(str(folders[1]), adapter_name="next", torch_device=device),
            lambda: peft.delete_adapter("next"),
        )
    ms = {name: 1e3 * each for name, each in alternate_and_undo(runs, rounds, model.device).items()}
    figures = {
        "file_bytes": float(sum(file.stat().st_size for file in folders[1].iterdir())),
        **{f"{name} (ms)": each for name, each in ms.items()},
        "loradeck / read": ms["loradeck, 1 resident"] / ms["read the bytes"],
    }
    if find_spec("peft"):
        figures["PEFT / loradeck"] = ms["PEFT, 1 resident"] / ms["loradeck, 1 resident"]
    return figures


def load_and_switch(model: nn.Module, folders: Sequence[Path], rounds: int) -> dict[str, float]:
    """Return what 200 resident adapters change for a load, and the microseconds that it takes to open a route."""
    few, many = Bank(shared_copy(model)), Bank(shared_copy(model))
    few.load(folders[0], "first")
    for i, folder in enumerate(folders[1:]):
        many.load(folder, f"resident {i}")
    times = alternate_and_undo(
        {
            "few": (lambda: few.load(folders[1], "next"), lambda: few.unload("next")),
            "many": (lambda: many.load(folders[1], "next"), lambda: many.unload("next")),
        },
        2 * rounds,
    )
    mixed = [f"resident {i}" for i in range(ROWS)]
    switch = alternate({"few": lambda: open_route(few, ["first"] * ROWS), "many": lambda: open_route(many, mixed)}, 200)
    return {
        "200 resident / 1 resident": times["many"] / times["few"],
        "switch, 1 resident, 16 rows of 1 (us)": switch["few"] * 1e6,
        "switch, 200 resident, 16 rows of 16 (us)": switch["many"] * 1e6,
    }


def alternate_and_undo(
    runs: Mapping[str, tuple[Callable[[], object], Callable[[], object]]],
    rounds: int,
    device: torch.device = CPU,
) -> dict[str, float]:
    """Return the median seconds of each run, which is undone after it was timed; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, (run, undo) in runs.items():
            gc.collect()
            times[name].append(seconds(run, device))
            undo()
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def open_route(bank: Bank, rows: list[str]) -> None:
    with bank.route(rows):
        pass


# ---- memory


def memory(folder: Path) -> dict[str, float]:
    """Return the resident memory that 100 loaded adapters add, each relative to its tensors' bytes.

    The model has SmolLM2-135M's shapes and no weights. Run it in a process of its own.
    """
    shapes = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shapes)
    bank = Bank(model.to_empty(device="cpu"))
    for i in range(5):
        bank.load(folder, f"warm-up {i}")
    gc.collect()
    before = resident()
    for i in range(COUNT):
        bank.load(folder, f"a{i}")
    gc.collect()
    nbytes = bank["a0"].nbytes
    return {"tensor_bytes": nbytes, "added per adapter / its bytes": (resident() - before) / COUNT / nbytes}


# ---- a decode step


@torch.inference_mode()
def step(model: Any, folders: Sequence[Path], rounds: int) -> dict[str, float]:
    """Return the milliseconds of one decode step, by what the rows go through; a row for each folder."""
    device, rows = model.device, len(folders)
    names = [folder.name for folder in folders]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, model.config.vocab_size, (rows, CONTEXT), generator=generator).to(device)
    cache, caches = cache_name(model), dict[str, Any]()

    def decode(module: Any, key: str, **settings: Any) -> Tensor:
        if key not in caches:
            caches[key] = module(prompt, use_cache=True, logits_to_keep=1, **settings)[cache]
        logits = module(prompt[:, :1], use_cache=True, **{cache: caches[key]}, **settings).logits[:, -1]
        caches[key].crop(-1)
        return logits

    adapted = shared_copy(model)
    with torch.inference_mode(False):
        bank = Bank(adapted)
        for folder in folders:
            bank.load(folder)
        peft = with_peft(model, folders) if find_spec("peft") else None

    def routed(key: str, route: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with bank.route(route):
                return decode(adapted, key)

        return run

    mixed = f"loradeck, {rows} adapters"
    runs: dict[str, Callable[[], Tensor]] = {
        "bare model": lambda: decode(model, "bare"),
        "loradeck, base rows": routed("base", [None] * rows),
        "loradeck, one adapter": routed("one", names[0]),
        mixed: routed("mixed", names),
    }
    if peft is not None:
        runs["PEFT, one adapter"] = lambda: decode(peft, "peft one")
        runs[f"PEFT, {rows} adapters"] = lambda: decode(peft, "peft mixed", adapter_names=names)
    runs[mixed]()  # the prompt
    runs[mixed]()
    bank._working_sets.clear()
    first = seconds(runs[mixed], device)
    ms = {name: 1e3 * each for name, each in alternate(runs, rounds, device=device).items()}
    near = {name: runs[name] for name in ("bare model", "loradeck, base rows")}
    base = alternate(near, 3 * rounds, device=device)  # close to each other: more rounds
    figures = {
        **{f"{name} (ms)": each for name, each in ms.items()},
        f"first step after a switch to {rows} new adapters (ms)": 1e3 * first,
        f"{rows} adapters / bare": ms[mixed] / ms["bare model"],
        "one adapter / bare": ms["loradeck, one adapter"] / ms["bare model"],
        "base rows / bare": base["loradeck, base rows"] / base["bare model"],
    }
    if peft is not None:
        figures[f"PEFT / loradeck, {rows} adapters"] = ms[f"PEFT, {rows} adapters"] / ms[mixed]
        figures["PEFT / loradeck, one adapter"] = ms["PEFT, one adapter"] / ms["loradeck, one adapter"]
        logits, expected = runs[mixed]().float(), runs[f"PEFT, {rows} adapters"]().float()
        figures["largest difference from PEFT's logits, relative"] = float(
            (logits - expected).abs().max() / expected.abs().max()
        )
    return figures
