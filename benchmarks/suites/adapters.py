"""Load, switch, memory and the mixed decode step, against PEFT in the same run on SmolLM2-135M.

    python -m benchmarks.suites.adapters [--rounds 15] [--dtypes float32 bfloat16]

Adapters: r=8 on all linear layers (210 modules). Step: 16 rows, 64 tokens of context, one new token each.
"""

import argparse
import copy
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.harness import in_turns, write
from loradeck import Bank, Base, LoraConfig

ROWS, CONTEXT, RESIDENT = 16, 64, 200
# transformers changed the word during version 5.
WORD = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=("load", "memory", "step"), default=["load", "memory", "step"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Base.load("smollm2-135m", dtype="float32")
        folders = make_adapters(base.model, Path(folder))
        figures: dict[str, Any] = {}
        if "load" in arguments.only:
            figures["load"] = load(base.model, folders, arguments.rounds)
        if "memory" in arguments.only:
            for dtype in ("float32", "bfloat16"):
                figures[f"memory {dtype}"] = memory(base.model, folders[0], dtype)
        del base
        for dtype in arguments.dtypes if "step" in arguments.only else ():
            base = Base.load("smollm2-135m", dtype=dtype)
            figures[f"step {dtype}"] = step(base.model, folders[:ROWS], arguments.rounds)
            del base
            gc.collect()
    if len(arguments.only) == 3:
        print(f"written: {write('adapters', figures)}")


def make_adapters(model: nn.Module, folder: Path) -> list[Path]:
    """Save one adapter with non-zero B and copy it under many names."""
    bank = Bank(model)
    folders = [folder / f"a{i:03d}" for i in range(RESIDENT)]
    for i in range(ROWS):
        bank.add("made", LoraConfig(r=8), generator=torch.Generator().manual_seed(i))
        for parameter in bank.parameters("made"):
            if parameter.shape[1] == 8:
                nn.init.normal_(parameter, std=0.02)
        bank.save("made", folders[i])
        bank.unload("made")
    bank.detach()
    for i in range(ROWS, RESIDENT):
        shutil.copytree(folders[i % ROWS], folders[i])
    return folders


def load(model: nn.Module, folders: list[Path], rounds: int) -> dict[str, float]:
    """Milliseconds to load one adapter more, with one resident and with many; PEFT with one resident, its best case."""
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    peft = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name="first")
    crowd = Bank(copy.deepcopy(model))
    bank = Bank(model)
    bank.load(folders[0], "first")
    kept: list[object] = []

    def read() -> None:  # into memory that stays, as an adapter's does: fresh pages are half of the cost
        kept[:] = [[file.read_bytes() for file in folders[1].iterdir()]]

    def ours() -> None:
        bank.load(folders[1], "next")

    def theirs() -> None:
        peft.load_adapter(str(folders[1]), adapter_name="next")

    def timed(way: Callable[[], object], undo: Callable[[], object]) -> float:
        gc.collect()
        start = time.perf_counter()
        way()
        elapsed = time.perf_counter() - start
        undo()
        return elapsed

    ways: dict[str, tuple[Callable[[], None], Callable[[], object]]] = {
        "read the bytes": (read, lambda: None),
        "loradeck, 1 resident": (ours, lambda: bank.unload("next")),
        "PEFT, 1 resident": (theirs, lambda: peft.delete_adapter("next")),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way, undo in ways.values():
        timed(way, undo)
    for _ in range(rounds):
        for name, (way, undo) in ways.items():
            times[name].append(timed(way, undo))
    few: list[float] = []
    many: list[float] = []
    for i, folder in enumerate(folders):
        crowd.load(folder, f"resident {i}")
    crowd.unload("resident 199")
    for _ in range(rounds * 2):  # in turns with the nearly empty bank
        few.append(timed(ours, lambda: bank.unload("next")))
        many.append(timed(lambda: crowd.load(folders[1], "next"), lambda: crowd.unload("next")))
    rows = [f"resident {i}" for i in range(ROWS)]
    switch = in_turns({"few": lambda: opened(bank, ["first"] * ROWS), "many": lambda: opened(crowd, rows)}, 200)
    crowd.detach()
    bank.detach()
    medians = {name: statistics.median(own) * 1e3 for name, own in times.items()}
    result = {
        "file_bytes": size,
        **{f"{name} (ms)": value for name, value in medians.items()},
        "PEFT / loradeck": medians["PEFT, 1 resident"] / medians["loradeck, 1 resident"],
        "loradeck / read": medians["loradeck, 1 resident"] / medians["read the bytes"],
        "200 resident / 1 resident": statistics.median(many) / statistics.median(few),
        "switch, 1 resident, 16 rows of 1 (us)": switch["few"] * 1e6,
        "switch, 200 resident, 16 rows of 16 (us)": switch["many"] * 1e6,
    }
    return show("load", result)


def opened(bank: Bank, rows: list[str]) -> None:
    with bank.route(rows):
        pass


def memory(model: nn.Module, folder: Path, dtype: str) -> dict[str, float]:
    """Resident memory per loaded adapter, at its own dtype: see benchmarks/memory.py."""
    with tempfile.TemporaryDirectory() as own:
        bank = Bank(model)
        bank.load(folder, "a")
        bank["a"].to(getattr(torch, dtype))
        bank.save("a", Path(own) / "a")
        bank.detach()
        command = [sys.executable, "-m", "benchmarks.suites._adapter_memory", str(Path(own) / "a")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return show(f"memory {dtype}", json.loads(done.stdout))


@torch.inference_mode()
def step(model: nn.Module, folders: list[Path], rounds: int) -> dict[str, float]:
    """Milliseconds of one decode step, all ways in turns."""
    torch.manual_seed(0)
    names = [folder.name for folder in folders]
    prompt = torch.randint(0, 49_000, (ROWS, CONTEXT))
    token = prompt[:, :1]
    caches: dict[str, Any] = {}

    def decode(own: nn.Module, key: str, **how: Any) -> None:
        if key not in caches:
            caches[key] = own(prompt, use_cache=True, **how)[WORD]
        own(token, use_cache=True, **{WORD: caches[key]}, **how)
        caches[key].crop(-1)

    bare = copy.deepcopy(model)
    with torch.inference_mode(False):
        peft = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name=names[0]).eval()
        for folder in folders[1:]:
            peft.load_adapter(str(folder), adapter_name=folder.name)
        peft.set_adapter(names[0])
        bank = Bank(model)
        for folder in folders:
            bank.load(folder)

    def routed(key: str, rows: Any) -> Callable[[], None]:
        def way() -> None:
            with bank.route(rows):
                decode(model, key)

        return way

    ways = {
        "bare model": lambda: decode(bare, "bare"),
        "loradeck, base rows": routed("base", [None] * ROWS),
        "loradeck, one adapter": routed("one", names[0]),
        "loradeck, 16 adapters": routed("mixed", names),
        "PEFT, one adapter": lambda: decode(peft, "peft one"),
        "PEFT, 16 adapters": lambda: decode(peft, "peft mixed", adapter_names=names),
    }
    start = time.perf_counter()
    ways["loradeck, 16 adapters"]()  # prefill and packing
    ways["loradeck, 16 adapters"]()
    bank._working_sets.clear()
    start = time.perf_counter()
    ways["loradeck, 16 adapters"]()
    first = time.perf_counter() - start
    medians = in_turns(ways, rounds)
    quiet = in_turns({name: ways[name] for name in ("bare model", "loradeck, base rows")}, rounds * 3)
    bank.detach()
    own, base = medians["loradeck, 16 adapters"], medians["bare model"]
    result = {
        **{f"{name} (ms)": value * 1e3 for name, value in medians.items()},
        "first step after a switch to 16 new adapters (ms)": first * 1e3,
        "PEFT / loradeck, 16 adapters": medians["PEFT, 16 adapters"] / own,
        "PEFT / loradeck, one adapter": medians["PEFT, one adapter"] / medians["loradeck, one adapter"],
        "16 adapters / bare": own / base,
        "one adapter / bare": medians["loradeck, one adapter"] / base,
        "base rows / bare": quiet["loradeck, base rows"] / quiet["bare model"],
    }
    return show(f"step {next(model.parameters()).dtype}", result)


def show(title: str, result: dict[str, float]) -> dict[str, float]:
    print(f"\n{title}")
    for name, value in result.items():
        print(f"  {name:<52} {value:>14,.3f}")
    return {name: round(value, 4) for name, value in result.items()}


if __name__ == "__main__":
    main()
