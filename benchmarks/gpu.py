"""The operation, a decode step, loading and training on a GPU, against float64 and PEFT, on bases of random weights.

    python -m benchmarks.gpu [--shape Llama-3.2-1B Llama-3.1-8B] [--rounds 15]
    python -m benchmarks.gpu --device cpu --shape tiny        # the same code, small, to see that it works

Needs torch and transformers and no network; PEFT is measured where it is installed, the Triton kernels where they are
in use. With the default shapes it writes results/gpu.json. Adapters: r=16 on all linear layers, in the base's dtype.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import gpu_ops
from benchmarks.gpu_shapes import SHAPES
from benchmarks.record import in_turns, write
from loradeck import Bank, Base, LoraConfig
from loradeck.base.fingerprint import fingerprint
from loradeck.base.weights import shared_copy
from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.ops.dispatch import why_not_triton
from loradeck.train.config import TrainConfig
from loradeck.train.events import AnyEvent, Step
from loradeck.train.trainer import Trainer

ROWS, CONTEXT, R = 32, 128, 16  # rows are adapters too
FOLDERS = 4  # on disk; the other adapters are the same bytes in memory of their own
RATE = 1e-4
# transformers changed the word during version 5.
WORD = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
LLAMAS = ("Llama-3.2-1B", "Llama-3.1-8B")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=LLAMAS)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"benchmarks.gpu: torch {torch.__version__} finds no CUDA device here; nothing was measured.")
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    problem = why_not_triton(device)
    print(
        f"{card or 'CPU'}; {dtype}; Triton kernels: {problem or 'in use'}; PEFT: {'here' if has_peft() else 'not here'}"
    )
    figures = {"operation, other layers": show("operation, other layers", gpu_ops.others(device))}
    for shape in arguments.shape:
        model = built(SHAPES[shape](), dtype, device)
        layers = gpu_ops.layers(model)
        with tempfile.TemporaryDirectory() as folder:
            folders = made(model, Path(folder), dtype)
            parts: dict[str, Callable[[], dict[str, float]]] = {
                "operation": partial(gpu_ops.errors, layers, dtype, device),
                "ways": partial(gpu_ops.ways, layers, dtype, device, arguments.rounds, settle),
                "decode": partial(decode, model, folders, arguments.rounds, settle),
                "load": partial(load, model, folders, arguments.rounds, settle),
                "train": partial(train, model, folders[0], arguments.rounds, settle),
            }
            for part, measure in parts.items():
                figures[f"{part} {shape}"] = show(f"{part} {shape}", measure())
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        del model
    if card and tuple(arguments.shape) == LLAMAS:
        versions = {} if problem else {"triton": version("triton")}
        print(f"written: {write('gpu', figures, versions, card=card)}")


def show(title: str, figures: dict[str, float]) -> dict[str, float]:
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:<64} {value:>14,.4g}")
    return figures


def has_peft() -> bool:
    return find_spec("peft") is not None


def built(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """A frozen base of this shape with random weights, made where it is to be."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def made(model: nn.Module, folder: Path, dtype: torch.dtype) -> list[Path]:
    """Save adapters whose B is not zero; there are ROWS of them, and files of FOLDERS."""
    bank = Bank(model)
    for i in range(FOLDERS):
        adapter = bank.add("made", LoraConfig(r=R, lora_alpha=2 * R), generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            for parameter in bank.parameters("made"):
                if parameter.shape[1] == R:
                    nn.init.normal_(parameter, std=0.02)
        adapter.to(dtype)
        bank.save("made", folder / f"a{i}")
        bank.unload("made")
    bank.detach()
    return [folder / f"a{i % FOLDERS}" for i in range(ROWS)]


def peft(model: Any, folders: list[Path], **how: Any) -> Any:
    """The model with these adapters, a0 and on, as PEFT has it, on the same weights."""
    from peft import PeftModel

    place = str(model.device)
    loaded = PeftModel.from_pretrained(shared_copy(model), folders[0], adapter_name="a0", torch_device=place, **how)
    for i, path in enumerate(folders[1:], start=1):
        loaded.load_adapter(str(path), adapter_name=f"a{i}", torch_device=place)
    return loaded


# ---- a decode step


@torch.inference_mode()
def decode(model: Any, folders: list[Path], rounds: int, settle: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a step of ROWS rows, one new token each after CONTEXT others; all ways in turns."""
    names = [f"a{i}" for i in range(ROWS)]
    prompt = torch.randint(2, model.config.vocab_size, (ROWS, CONTEXT), device=model.device)
    caches: dict[str, Any] = {}

    def step(own: Any, key: str, **how: Any) -> torch.Tensor:
        if key not in caches:
            caches[key] = own(prompt, use_cache=True, logits_to_keep=1, **how)[WORD]
        scores = own(prompt[:, :1], use_cache=True, **{WORD: caches[key]}, **how).logits[:, -1]
        caches[key].crop(-1)
        return scores

    ours = shared_copy(model)
    with torch.inference_mode(False):
        bank = Bank(ours)
        for name, folder in zip(names, folders, strict=True):
            bank.load(folder, name)
        theirs = peft(model, folders).eval() if has_peft() else None

    def routed(key: str, rows: Any) -> Callable[[], torch.Tensor]:
        def way() -> torch.Tensor:
            with bank.route(rows):
                return step(ours, key)

        return way

    base, one, mixed = "base", "loradeck, one adapter", f"loradeck, {ROWS} adapters"
    ways: dict[str, Callable[[], torch.Tensor]] = {
        base: lambda: step(model, "bare"),
        "loradeck, base rows": routed("base", [None] * ROWS),
        one: routed("one", names[0]),
        mixed: routed("mixed", names),
    }
    if theirs is not None:
        ways["PEFT, one adapter"] = lambda: step(theirs, "peft one")
        ways[f"PEFT, {ROWS} adapters"] = lambda: step(theirs, "peft mixed", adapter_names=names)
    ways[mixed]()  # the prompt
    bank._working_sets.clear()
    first = timed(ways[mixed], settle)
    apart = 0.0
    if theirs is not None:
        expected, found = ways[f"PEFT, {ROWS} adapters"]().float(), ways[mixed]().float()
        apart = float((found - expected).abs().max() / expected.abs().max())
    ms = {name: 1e3 * seconds for name, seconds in in_turns(ways, rounds, settle).items()}
    switch = statistics.median(timed(lambda: opened(bank, names), settle) for _ in range(10 * rounds))
    figures = {f"{name} (ms)": value for name, value in ms.items()} | {
        "loradeck, base rows / base": ms["loradeck, base rows"] / ms[base],
        "one adapter / base": ms[one] / ms[base],
        f"{ROWS} adapters / base": ms[mixed] / ms[base],
        "switch: a new route (us)": 1e6 * switch,
        f"first step after a switch to {ROWS} adapters (ms)": 1e3 * first,
    }
    if theirs is not None:
        figures[f"PEFT / loradeck, {ROWS} adapters"] = ms[f"PEFT, {ROWS} adapters"] / ms[mixed]
        figures["PEFT / loradeck, one adapter"] = ms["PEFT, one adapter"] / ms[one]
        figures["logits apart from PEFT's, of the largest"] = apart
    return figures


def opened(bank: Bank, names: list[str]) -> None:
    with bank.route(names):
        pass


def timed(way: Callable[[], object], settle: Callable[[], object]) -> float:
    settle()
    start = time.perf_counter()
    way()
    settle()
    return time.perf_counter() - start


# ---- loading


def load(model: Any, folders: list[Path], rounds: int, settle: Callable[[], object]) -> dict[str, float]:
    """Milliseconds from files in the page cache to an adapter on the device, one being there already."""
    bank = Bank(shared_copy(model))
    bank.load(folders[0], "first")
    kept: list[object] = []
    size = sum(file.stat().st_size for file in folders[1].iterdir())
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "read the bytes": (lambda: kept.append([f.read_bytes() for f in folders[1].iterdir()]), kept.clear),
        "loradeck": (lambda: bank.load(folders[1], "next"), lambda: bank.unload("next")),
    }
    if has_peft():
        theirs, place = peft(model, folders[:1]), str(model.device)
        ways["PEFT"] = (
            lambda: theirs.load_adapter(str(folders[1]), adapter_name="next", torch_device=place),
            lambda: theirs.delete_adapter("next"),
        )
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (way, undo) in ways.items():
            seconds = timed(way, settle)
            undo()
            if turn:
                times[name].append(1e3 * seconds)
    ms = {name: statistics.median(own) for name, own in times.items()}
    figures = {"file_bytes": float(size), **{f"{name} (ms)": value for name, value in ms.items()}}
    return figures | ({"PEFT / loradeck": ms["PEFT"] / ms["loradeck"]} if has_peft() else {})


# ---- a training step


def train(model: Any, folder: Path, rounds: int, settle: Callable[[], object]) -> dict[str, float]:
    """Seconds of an optimizer step on 4 sequences of the same length, so that PEFT pads nothing; in turns."""
    length = min(512, model.config.max_position_embeddings)
    tokens = torch.randint(2, model.config.vocab_size, (4, length))
    losses: dict[str, list[float]] = {name: [] for name in ("loradeck", "PEFT") if name != "PEFT" or has_peft()}
    examples = [Example(row, [UNSUPERVISED, *row[1:]]) for row in tokens.tolist()]
    own = passes(shared_copy(model), folder, examples, rounds + 1, losses["loradeck"])
    ways: dict[str, Callable[[], object]] = {"loradeck": lambda: next(own)}
    if has_peft():
        ways["PEFT, plain loop"] = plain(model, folder, tokens.to(model.device), losses["PEFT"])
    seconds = in_turns(ways, rounds, settle)
    figures = {f"{name} (tokens/s)": tokens.numel() / each for name, each in seconds.items()}
    if "PEFT" in losses:
        figures["PEFT / loradeck, time of a step"] = seconds["PEFT, plain loop"] / seconds["loradeck"]
        pairs = zip(*losses.values(), strict=True)
        figures["losses of a step apart, at most"] = max(abs(one - other) for one, other in pairs)
    return figures


def passes(model: Any, folder: Path, examples: list[Example], steps: int, losses: list[float]) -> Iterator[int]:
    def hear(event: AnyEvent) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)

    # pyrefly: ignore [bad-argument-type]  (a trainer reads no text)
    base = Base(model, None, "random", "random", fingerprint(model))
    bank = Bank(model)
    total = sum(len(example.tokens) for example in examples)
    trainer = Trainer(base, bank, max_tokens=total, on_event=hear)  # at once, as PEFT's
    config = TrainConfig(
        learning_rate=RATE, schedule="constant", warmup_ratio=0, batch_size=len(examples), max_steps=steps
    )
    trainer.add(bank.load(folder, "own", trainable=True), examples, config)
    return iter(trainer)


def plain(model: Any, folder: Path, tokens: torch.Tensor, losses: list[float]) -> Callable[[], None]:
    theirs = peft(model, [folder], is_trainable=True).train()
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)

    def step() -> None:
        loss = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    return step


if __name__ == "__main__":
    main()
