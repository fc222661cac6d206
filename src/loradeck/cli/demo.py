"""`loradeck demo`: the whole idea, on the tutorial's toy and on a real base. Tells a story; all it uses is public."""

import shlex
import sys
import time
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

from loradeck.cli.screen import shown, size
from loradeck.errors import AdapterError, BaseModelError, LoradeckError

if TYPE_CHECKING:
    from rich.console import Console

    from loradeck.base.load import Base
    from loradeck.lora.bank import Bank
    from loradeck.train.config import TrainConfig

FIRST, SECOND = "pirate", "json"  # adapters, and datasets of the package
MARK = "loradeck demo"  # in the record of the adapters that the demo may replace
ROUNDS = 20  # of each measurement, whose median counts
BASE = "smollm2-135m"


def demo(*, adapters: Path = Path("adapters"), quick: bool = False, seed: int = 0) -> None:
    """Show the whole idea: train two adapters, switch and blend them, in minutes.

    Where smollm2-135m cannot be had, only the toy's part is shown.

    Args:
        adapters: A folder for the two adapters.
        quick: Train a few steps only, to see that all works.
        seed: Seed of the training.
    """
    for name in (FIRST, SECOND):
        check_own(adapters / name)

    from rich.console import Console

    console = Console(highlight=False)
    toy_story(console)

    from loradeck.base.load import Base

    console.print(f"\n[bold]2. A real base[/]: {BASE}")
    try:
        base = Base.load(BASE)
    except BaseModelError as error:
        print(shown(f"{error}\nSo the demo ends with the toy; `loradeck doctor` says more."))
        return
    real_story(console, base, adapters, quick=quick, seed=seed)


def check_own(folder: Path) -> None:
    """Refuse to replace an adapter that is not the demo's.

    Raises:
        AdapterError: it is not.
    """
    from loradeck.lora.manifest import is_adapter, read_folder

    if not folder.is_dir() or not is_adapter(folder):
        return
    try:
        maker = read_folder(folder).origin.provenance.get("made_by")
    except LoradeckError:
        maker = None
    if maker != MARK:
        raise AdapterError(
            f"{folder} holds an adapter that is not the demo's",
            hint="Name another place: loradeck demo --adapters FOLDER",
        )


def toy_story(console: "Console") -> None:
    """The tutorial: ten colours, three layers, one adapter."""
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
   red orange yellow green blue indigo violet magenta: it says [magenta]{before}[/].
   Its linear layer has {model.linear.weight.numel():,} weights W. They stay as they are: an
   adapter of rank 2 makes the layer W x + B (A x), and A and B together have
   {share} of W's size. An x that begins with {x[0, 0, 0]:.4f} goes through
   both and keeps its shape, {shape}.
   Through the adapter the toy says [blue]{after}[/]; without it, {again} as before."""
    )


def real_story(console: "Console", base: "Base", adapters: Path, *, quick: bool, seed: int) -> None:
    """Train two adapters, load them back, and let them answer in one batch."""
    from loradeck.lora.bank import Bank
    from loradeck.train.config import TrainConfig

    recipe = TrainConfig(batch_size=4, epochs=3, max_length=256, max_steps=2 if quick else None, seed=seed)
    whole = sum(parameter.nbytes for parameter in base.model.parameters())
    bank = Bank(base.model)
    for name in (FIRST, SECOND):
        teach(console, base, bank, name, recipe, adapters / name)
        own = bank[name].nbytes
        print(shown(f"   saved in {adapters / name}: {size(own)}, {own / whole:.1%} of the base's {size(whole)}"))

    console.print("\n[bold]3. Back from disk[/]")
    load, switch = measure(bank, adapters)
    print(f"   one adapter loads in {load * 1e3:.1f} ms; 16 rows switch adapters in {switch * 1e6:.0f} µs")
    print(f"   (medians of {ROUNDS})")

    console.print("\n[bold]4. One batch[/], every row through its own adapter")
    answers(console, base, bank, quick=quick)
    console.print("\n[bold]What to try next[/]")
    on_path = which("loradeck") or Path(sys.argv[0]).name != "loradeck"
    program = "loradeck" if on_path else sys.argv[0]  # after `make demo`, .venv/bin/loradeck
    first, second = str(adapters / FIRST), str(adapters / SECOND)
    for command in (
        ["chat", BASE, "--adapter", first, "--adapter", second],
        ["generate", BASE, "Where is Lima?", "--adapter", f"{first}*0.7+{second}*0.3"],
        ["diff", first, second],
        ["train", BASE, "YOUR.jsonl", "--output", str(adapters / "yours")],
    ):
        print(shown("   " + shlex.join([program, *command])))


def teach(console: "Console", base: "Base", bank: "Bank", name: str, recipe: "TrainConfig", folder: Path) -> None:
    """Train an adapter on a dataset of this package, and save it."""
    from importlib.resources import as_file, files

    import torch

    from loradeck.cli.live_view import progress
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
    bank.save(name, folder, made_by=MARK)


def measure(bank: "Bank", adapters: Path) -> tuple[float, float]:
    """Load both adapters from disk; return the median seconds of a load, and of a route of 16 rows not used before."""
    from statistics import median

    loads: list[float] = []
    switches: list[float] = []
    for name in [FIRST, SECOND] * (ROUNDS // 2):
        bank.unload(name)
        begun = time.perf_counter()
        bank.load(adapters / name)
        loads.append(time.perf_counter() - begun)
    for count in range(ROUNDS):
        blend = {FIRST: count / ROUNDS, SECOND: 1 - count / ROUNDS}
        begun = time.perf_counter()
        with bank.route([FIRST, SECOND, blend, None] * 4):
            switches.append(time.perf_counter() - begun)
    return median(loads), median(switches)


def answers(console: "Console", base: "Base", bank: "Bank", *, quick: bool) -> None:
    """Print a table of answers to prompts of neither dataset, by base, each adapter and half of each: one batch."""
    from importlib.resources import files

    import msgspec
    from rich.markup import escape
    from rich.table import Table

    from loradeck.generation import generate

    prompts = msgspec.json.decode((files("loradeck.demo") / "prompts.json").read_bytes(), type=list[str])
    prompts = prompts[: 1 if quick else 4]
    ways = {"base": None, FIRST: FIRST, SECOND: SECOND, "half of each": {FIRST: 0.5, SECOND: 0.5}}
    rows = [(prompt, way) for prompt in prompts for way in ways.values()]
    begun = time.perf_counter()
    said = generate(base, bank, [p for p, _ in rows], [way for _, way in rows], max_new_tokens=8 if quick else 40)
    took = time.perf_counter() - begun
    table = Table(show_lines=True)
    for head in ("", *ways):
        table.add_column(head, overflow="fold")
    for prompt in prompts:
        table.add_row(prompt, *(escape(shown(" ".join(said.pop(0).split()))) for _ in ways))
    console.print(table)
    print(f"   {len(rows)} rows in {took:.1f} s")
