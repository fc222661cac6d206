"""`loradeck demo`: the whole idea on a toy model and on a real base, with public calls only."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from loradeck.cli.display.text import format_size, printable
from loradeck.errors import AdapterError, BaseModelError, LoradeckError

if TYPE_CHECKING:
    from rich.console import Console

    from loradeck.base.load import Base
    from loradeck.lora.bank import Bank
    from loradeck.train.config import TrainConfig

FIRST, SECOND = "pirate", "json"  # adapters, and datasets of the package
MADE_BY = "loradeck demo"  # in the provenance of adapters that the demo may replace
INTERVAL = 2  # seconds between two lines of progress where there is no terminal
ROUNDS = 20  # of each measurement; the median is printed
BASE = "smollm2-135m"


def demo(*, adapters: Path = Path("adapters"), quick: bool = False, seed: int = 0) -> None:
    """Train two adapters, then switch and blend them: in minutes.

    Without smollm2-135m it shows only the part with the toy.

    Args:
        adapters: A folder for the two adapters.
        quick: Train only two steps, to check that all works.
        seed: Seed of the training.
    """
    for name in (FIRST, SECOND):
        check_replaceable(adapters / name)

    from rich.console import Console

    console = Console(highlight=False)
    with working(console, "loading torch and transformers"):
        from loradeck.base.load import Base
    toy_story(console)
    console.print(f"\n[bold]2. A real base[/]: {BASE}")
    try:
        with working(console, "loading it: a few seconds; up to a minute the first time, which unpacks it"):
            base = Base.load(BASE)
    except BaseModelError as error:
        print(printable(f"{error.report()}\nThe demo ends here; `loradeck doctor` says more."))
        return
    real_story(console, base, adapters, quick=quick, seed=seed)


@contextmanager
def working(console: "Console", text: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, with a spinner on a terminal; yield a function that shows how far it is."""
    if console.is_terminal and not console.is_dumb_terminal:
        with console.status(text) as status:
            yield status.update
        return
    print(f"   {text}", flush=True)
    last = time.monotonic()

    def update(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= INTERVAL:
            print(f"   {text}", flush=True)
            last = time.monotonic()

    yield update


def check_replaceable(folder: Path) -> None:
    """Refuse to replace an adapter that the demo has not made.

    Raises:
        AdapterError: the folder contains such an adapter.
    """
    from loradeck.lora.manifest import is_adapter, read_folder

    if not folder.is_dir() or not is_adapter(folder):
        return
    try:
        maker = read_folder(folder).origin.provenance.get("made_by")
    except LoradeckError:
        maker = None
    if maker != MADE_BY:
        raise AdapterError(
            f"{folder} contains an adapter that the demo has not made",
            hint="Use another folder: loradeck demo --adapters FOLDER",
        )


def toy_story(console: "Console") -> None:
    """Part 1: a toy model of ten colours and three layers, and one adapter."""
    import torch

    from loradeck.lora.adapter import Adapter
    from loradeck.lora.bank import Bank
    from loradeck.lora.config import LoraConfig
    from loradeck.toy import ToyModel, generate_token

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(42)
        model = ToyModel(hidden_size=1024)
        tokens = torch.arange(8)[None]
        before = generate_token(model, tokens)[0]
        x, a, b = torch.randn(1, 8, 1024), torch.randn(1024, 2), torch.randn(2, 1024)
        share = (a.numel() + b.numel()) / model.linear.weight.numel()
        # The tutorial writes x A B with A (in, r) and B (r, out); here, as in PEFT, A is (r, in) and B (out, r).
        pair = torch.randn(1024, 2).T, torch.randn(2, 1024).T
        bank = Bank(model)
        bank.add("colour", Adapter.of(LoraConfig(r=2, lora_alpha=2, target_modules=["linear"]), {"linear": pair}))
        with bank.route("colour"):
            after, shape = generate_token(model, tokens)[0], tuple(model.linear(x).shape)
        again = generate_token(model, tokens)[0]
    console.print(
        f"""\
[bold]1. The idea, on a toy[/] that continues colours
   After red orange yellow green blue indigo violet magenta it says [magenta]{before}[/].
   Its linear layer has {model.linear.weight.numel():,} weights W, which never change: an
   adapter of rank 2 turns the layer into W x + B (A x), and A and B together
   have {share} of W's size. An x that begins with {x[0, 0, 0]:.4f} passes
   through both and keeps its shape, {shape}.
   With the adapter the toy says [blue]{after}[/]; without it, {again} as before."""
    )


def real_story(console: "Console", base: "Base", adapters: Path, *, quick: bool, seed: int) -> None:
    """Parts 2 to 4: train two adapters, load them back, and answer with both in one batch."""
    from loradeck.lora.bank import Bank
    from loradeck.train.config import TrainConfig

    recipe = TrainConfig(
        batch_size=1 if quick else 4, epochs=3, max_length=256, max_steps=2 if quick else None, seed=seed
    )
    base_bytes = sum(parameter.nbytes for parameter in base.model.parameters())
    bank = Bank(base.model)
    for name in (FIRST, SECOND):
        teach(console, base, bank, name, recipe, adapters / name)
        nbytes = bank[name].nbytes
        share = f"{nbytes / base_bytes:.1%} of the base's {format_size(base_bytes)}"
        print(printable(f"   saved in {adapters / name}: {format_size(nbytes)}, {share}"))

    console.print("\n[bold]3. Back from disk[/]")
    with working(console, f"loading each {ROUNDS // 2} times, switching {ROUNDS} times"):
        load, switch = measure(bank, adapters)
    print(f"   one adapter loads in {load * 1e3:.1f} ms; 16 rows switch adapters in {switch * 1e6:.0f} µs")
    print(f"   (medians of {ROUNDS})")

    console.print("\n[bold]4. One batch[/], each row with its own adapter")
    answers(console, base, bank, quick=quick)
    console.print("\n[bold]What to try next[/]")
    on_path = which("loradeck") or Path(sys.argv[0]).name != "loradeck"
    program = "loradeck" if on_path else sys.argv[0]  # after `make demo`, .venv/bin/loradeck
    first, second = str(adapters / FIRST), str(adapters / SECOND)
    for command in (
        ["studio", BASE, "--adapters", str(adapters)],
        ["chat", BASE, "--adapter", first, "--adapter", second],
        ["generate", BASE, "Where is Lima?", "--adapter", f"{first}*0.7+{second}*0.3"],
        ["diff", first, second],
        ["train", BASE, "YOUR.jsonl", "--output", str(adapters / "yours")],
    ):
        print(printable("   " + shlex.join([program, *command])))


def teach(console: "Console", base: "Base", bank: "Bank", name: str, recipe: "TrainConfig", folder: Path) -> None:
    """Train an adapter on one of the package's datasets, and save it."""
    from importlib.resources import as_file, files

    import torch

    from loradeck.cli.display.live_view import progress
    from loradeck.dataset.read import read_dataset
    from loradeck.lora.config import LoraConfig
    from loradeck.train.trainer import train

    with as_file(files("loradeck.demo") / f"{name}.jsonl") as path:
        examples = read_dataset(path, base.tokenizer, recipe.max_length).train
    bank.add(name, LoraConfig(), generator=torch.Generator().manual_seed(recipe.seed))
    print(f"   training {name} on {len(examples)} examples")
    with progress(console) as on_event:
        result = train(base, bank, name, examples, recipe, on_event=on_event)
    if result.interrupted:
        raise KeyboardInterrupt
    bank.save(name, folder, made_by=MADE_BY)


def measure(bank: "Bank", adapters: Path) -> tuple[float, float]:
    """Load both adapters from disk; return the median seconds of a load, and of a new route of 16 rows."""
    from statistics import median

    loads: list[float] = []
    switches: list[float] = []
    for name in [FIRST, SECOND] * (ROUNDS // 2):
        bank.unload(name)
        start = time.perf_counter()
        bank.load(adapters / name)
        loads.append(time.perf_counter() - start)
    for count in range(ROUNDS):
        blend = {FIRST: count / ROUNDS, SECOND: 1 - count / ROUNDS}
        start = time.perf_counter()
        with bank.route([FIRST, SECOND, blend, None] * 4):
            switches.append(time.perf_counter() - start)
    return median(loads), median(switches)


def answers(console: "Console", base: "Base", bank: "Bank", *, quick: bool) -> None:
    """Print the answers to new prompts of the base, each adapter and a blend of both, computed in one batch."""
    from importlib.resources import files

    import msgspec
    from rich.markup import escape
    from rich.table import Table

    from loradeck.generation import generate

    prompts = msgspec.json.decode((files("loradeck.demo") / "prompts.json").read_bytes(), type=list[str])
    prompts = prompts[: 1 if quick else 4]
    columns = {"base": None, FIRST: FIRST, SECOND: SECOND, "half of each": {FIRST: 0.5, SECOND: 0.5}}
    rows = [(prompt, entry) for prompt in prompts for entry in columns.values()]
    start = time.perf_counter()
    max_new_tokens = 8 if quick else 40
    with working(console, f"answering {len(rows)} prompts at once") as update:
        texts = generate(
            base,
            bank,
            [row[0] for row in rows],
            [row[1] for row in rows],
            max_new_tokens=max_new_tokens,
            on_step=lambda count: update(f"answering {len(rows)} prompts at once: {count} of {max_new_tokens} tokens"),
        )
    seconds = time.perf_counter() - start
    table = Table(show_lines=True)
    for head in ("", *columns):
        table.add_column(head, overflow="fold")
    for prompt in prompts:
        table.add_row(prompt, *(escape(printable(" ".join(texts.pop(0).split()))) for _ in columns))
    console.print(table)
    print(f"   {len(rows)} rows in {seconds:.1f} s")
