"""`loradeck train`: a dataset and a base into an adapter's folder. Decides what is written; trains nothing itself."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loradeck.cli.options import Dtype
from loradeck.cli.screen import shown, size
from loradeck.errors import AdapterError
from loradeck.lora.config import LoraConfig
from loradeck.lora.names import check_name
from loradeck.train.config import TrainConfig

# The settings of an adapter that are flags here; patterns for single modules are for Python.
FLAGS = re.compile("^(lora|r|lora_alpha|lora_dropout|target_modules|use_rslora)$")
LORA, RECIPE = LoraConfig(), TrainConfig()


def train(
    base: str,
    dataset: Path,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    lora: Annotated[LoraConfig, Parameter(name="*", parse=FLAGS)] = LORA,
    recipe: Annotated[TrainConfig, Parameter(name="*")] = RECIPE,
    dtype: Dtype = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
) -> int:
    """Train an adapter on a dataset of JSON lines.

    Each line has messages, or prompt and completion, or text. --target-modules
    takes modules' names with commas between them, as in q_proj,v_proj, or what
    its help says. Ctrl-C ends the training and saves what there is.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        dataset: A JSONL file.
        output: The adapter's folder; its name is the adapter's.
        dry_run: Print the plan and train nothing.
        overwrite: Replace an adapter that is already there.
    """
    name = output.resolve().name
    check_name(name)
    check_output(output, overwrite=overwrite)

    import hashlib

    import torch
    from rich.console import Console

    from loradeck.base.load import Base
    from loradeck.base.text import chat_template_hash
    from loradeck.lora.bank import Bank
    from loradeck.train.dataset import read_dataset
    from loradeck.train.plan import plan
    from loradeck.train.progress import progress, table
    from loradeck.train.trainer import train as run

    console = Console()
    loaded = Base.load(base, dtype=dtype)
    examples = read_dataset(dataset, loaded.tokenizer, recipe.max_length)
    bank = Bank(loaded.model)
    bank.add(name, suffixes(lora), generator=torch.Generator().manual_seed(recipe.seed))
    console.print(table(plan(loaded, bank, name, examples, recipe)))
    if dry_run:
        return 0
    with progress(console) as on_step:
        result = run(loaded, bank, name, examples, recipe, on_step=on_step)
    if not result.steps:
        print("interrupted before the first step: nothing was saved")
        return 130
    bank.save(
        name,
        output,
        data_sha256=hashlib.sha256(dataset.read_bytes()).hexdigest(),
        chat_template_sha256=chat_template_hash(loaded.tokenizer) or "none",
        steps=str(result.steps),
    )
    if result.interrupted:
        print(f"interrupted: saved what {result.steps} steps made")
    print(
        shown(
            f"{output}: {size(bank[name].nbytes)}, loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} in "
            f"{result.steps} steps, {result.seconds:.0f} s, {result.tokens / result.seconds:.0f} tokens/s"
        )
    )
    print(shown("try: " + shlex.join(["loradeck", "generate", base, "Hello!", "--adapter", str(output)])))
    return 130 if result.interrupted else 0


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Find out before hours of training whether the adapter can be saved.

    Raises:
        AdapterError: the folder is a file, holds an adapter, or cannot be written.
    """
    import tempfile

    from loradeck.cli.summary import is_adapter

    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file", mend="Name a folder.")
    if not overwrite and folder.is_dir() and is_adapter(folder):
        raise AdapterError(f"{folder} holds an adapter", mend="Name another folder, or pass --overwrite.")
    place = next(parent for parent in folder.resolve().parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=place, prefix=".loradeck-").cleanup()
    except OSError as error:
        raise AdapterError(f"{folder} cannot be written: {place}: {error.strerror}", mend="Name another.") from error


def suffixes(config: LoraConfig) -> LoraConfig:
    """Take a plain word for a module's name, and words with commas for several; all else is as in LoraConfig."""
    words = config.target_modules
    if isinstance(words, str) and words != "attention" and re.fullmatch(r"[\w.]+(,[\w.]+)*", words):
        return replace(config, target_modules=words.split(","))
    return config
