"""Memory and speed of training on datasets of different sizes; needs Linux.

    python -m benchmarks data [--sizes 10 100 1000] [--rounds 3]

Each size, in MB of text, has a process of its own: it reads the file, holds a hundredth of it out, and takes a few
steps with a tiny model of random weights. The tokenizer knows only whole words, so that reading is as fast as it can
be. 10 GB, --sizes 10 10000, takes 20 GB of disk, with TMPDIR to say where.
"""

import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import CPU, Run, alternate, in_new_process, parser
from benchmarks.models import WORDS, random_model, words_tokenizer
from loradeck import Bank, Base, LoraConfig
from loradeck.base.fingerprint import fingerprint
from loradeck.dataset.held_out import held_out
from loradeck.dataset.read import read_dataset
from loradeck.dataset.reader import DatasetReader
from loradeck.dataset.source import find
from loradeck.train.config import TrainConfig
from loradeck.train.trainer import train

RECORD_WORDS = (20, 130)  # of a prompt, of its completion: about a kilobyte
MAX_LENGTH = 256
STEPS = 5
MB = 10**6
EXCESS = "above that of the smallest (MB)"
STORED = "read and stored / read"

SUITE = Suite(
    "data",
    "Datasets",
    "records of a kilobyte, a tokenizer of whole words, a tiny model of random weights",
    (
        Table(
            "Reading, and a few steps",
            ("{column} of text", "{row}"),
            (
                Figure("peak memory (MB)"),
                Figure(EXCESS, "more than for the smallest dataset", "MB", "≤ 200"),
                Figure("peak memory of its own (MB)", "without what is only mapped from files", "MB"),
                Figure("read (MB/s)"),
            ),
        ),
        Table(
            "Keeping the examples on disk",
            ("storing", "{row}"),
            (Figure(STORED, "time of reading and storing, relative to reading alone", "×", "≤ 1.25"),),
        ),
    ),
    """
- *peak memory*: the kernel's, of the whole process with torch; reading, holding out and the steps.
""",
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=3)
    options.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="in MB, ascending")
    run = Run(SUITE, options, arguments)
    least: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        for size in run.options.sizes:
            path = Path(folder) / f"{size}.jsonl"
            write(path, size * MB)
            figures = in_new_process(trained, path)
            least = figures["peak memory (MB)"] if least is None else least
            figures[EXCESS] = figures["peak memory (MB)"] - least
            run.add(f"{size:,} MB of text", figures)
            if size != min(run.options.sizes):
                path.unlink()
        run.add(
            "storing", in_new_process(storing, Path(folder) / f"{min(run.options.sizes)}.jsonl", run.options.rounds)
        )
    run.end()


def write(path: Path, nbytes: int) -> None:
    """Write records of random words until there are as many bytes."""
    choose = random.Random(0).choices
    with path.open("wb") as file:
        while file.tell() < nbytes:
            prompt, completion = (" ".join(choose(WORDS, k=count)) for count in RECORD_WORDS)
            file.write(msgspec.json.encode({"prompt": prompt, "completion": completion}) + b"\n")


def trained(path: Path) -> dict[str, float]:
    """Read a dataset and take a few steps; return the memory that this process took at its peak, and the speed."""
    base = tiny()
    with peaks() as memory:
        start = time.perf_counter()
        dataset = read_dataset(path, base.tokenizer, MAX_LENGTH)
        seconds = time.perf_counter() - start
        examples, valid = held_out(dataset.train, 0.01, seed=0)
        bank = Bank(base.model)
        bank.add("new", LoraConfig(r=4))
        train(base, bank, "new", examples, TrainConfig(batch_size=4, max_steps=STEPS), valid=valid[:8])
    return {
        "peak memory (MB)": memory["VmHWM"],
        "peak memory of its own (MB)": memory["RssAnon"],
        "read (MB/s)": path.stat().st_size / MB / seconds,
    }


def storing(path: Path, rounds: int) -> dict[str, float]:
    """Return the time of reading a dataset relative to that of only making its examples."""
    tokenizer = words_tokenizer()

    def read() -> None:
        for _ in DatasetReader(find(path), tokenizer, MAX_LENGTH).rows():
            pass

    times = alternate({"stored": lambda: read_dataset(path, tokenizer, MAX_LENGTH), "read": read}, rounds)
    return {STORED: times["stored"] / times["read"]}


def tiny() -> Base:
    model = random_model("tiny", CPU)
    return Base(model, words_tokenizer(), "tiny", "tiny", fingerprint(model))


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Yield a dictionary that holds in the end the peaks of this process's memory by the kernel's names, in MB."""
    memory = {"VmHWM": 0.0, "RssAnon": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            sample()

    def sample() -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in memory:
                memory[name] = max(memory[name], int(value.split()[0]) * 1024 / MB)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()
        sample()
