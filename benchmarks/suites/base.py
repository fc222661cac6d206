"""What a base's packed and int8 weights change: plain transformers' forward passes, memory, and perplexity.

    python -m benchmarks.suites.base [--rounds 15] [--tokens 8192]

The ways take turns in one run; speeds are medians. The perplexity is that of docstrings of Python's standard library,
in windows of 512 tokens.
"""

import argparse
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import in_quiet_turns, write
from loradeck.base.load import SMOLLM2, Base
from loradeck.base.weights import CHOICES

DTYPES = ("bfloat16", "float32")
PASSES = {
    "decode, 1 row": (1, 1),
    "decode, 16 rows": (16, 1),
    "prefill, 1 x 512": (1, 512),
    "prefill, 16 x 64": (16, 64),
}
PROMPT, WINDOW = 64, 512
MODULES = (
    "argparse",
    "asyncio",
    "collections",
    "contextlib",
    "csv",
    "decimal",
    "difflib",
    "fractions",
    "functools",
    "heapq",
    "inspect",
    "json",
    "logging",
    "pathlib",
    "pickle",
    "random",
    "re",
    "shelve",
    "socket",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "unittest",
    "uuid",
    "zipfile",
)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    figures: dict[str, object] = {}
    for dtype in DTYPES:
        bases = {weights: Base.load(SMOLLM2, dtype=dtype, device="cpu", weights=weights) for weights in CHOICES}
        models = {weights: base.model for weights, base in bases.items()}
        own: dict[str, object] = {"MB": {weights: round(_bytes(model) / 1e6, 1) for weights, model in models.items()}}
        for name, (rows, tokens) in PASSES.items():
            times = in_quiet_turns(
                {weights: forward_pass(model, rows, tokens) for weights, model in models.items()}, arguments.rounds
            )
            own[f"{name}, ms"] = {weights: round(seconds * 1e3, 1) for weights, seconds in times.items()}
            print(dtype, name, own[f"{name}, ms"], flush=True)
        ids = bases["plain"].tokenizer(_text())["input_ids"][: arguments.tokens]
        own["perplexity"] = {weights: round(_perplexity(model, ids), 4) for weights, model in models.items()}
        print(dtype, own["perplexity"], own["MB"], flush=True)
        figures[dtype] = own
    print(f"written: {write('base', figures)}")


def forward_pass(model: PreTrainedModel, rows: int, tokens: int) -> Callable[[], object]:
    """One forward pass: a step after a prompt of 64 tokens where `tokens` is 1, else a prefill for its last logits."""
    ids = torch.randint(0, 1000, (rows, max(tokens, PROMPT)), generator=torch.Generator().manual_seed(0))
    if tokens > 1:
        return partial(model, input_ids=ids, use_cache=True, logits_to_keep=1)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    word = "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"

    def step() -> None:
        model(input_ids=ids[:, :1], use_cache=True, **{word: cache})
        cache.crop(-1)

    return step


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _perplexity(model: PreTrainedModel, ids: list[int]) -> float:
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    losses: list[Tensor] = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, window[1:], reduction="none"))
    return math.exp(float(torch.cat(losses).double().mean()))


def _text() -> str:
    modules: Mapping[str, object] = {name: importlib.import_module(name) for name in MODULES}
    return "\n\n".join(
        inspect.cleandoc(each.__doc__)
        for name, module in modules.items()
        for each in (module, *(vars(module)[key] for key in sorted(vars(module))))
        if isinstance(each.__doc__, str) and (each is module or getattr(each, "__module__", None) == name)
    )


if __name__ == "__main__":
    main()
