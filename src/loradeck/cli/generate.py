"""`loradeck generate`: answer prompts in batches, each with its own adapter."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated

from cyclopts import Parameter

from loradeck.base.onednn import cap_kernel_cache
from loradeck.cli import blend
from loradeck.cli.display.text import print_json, printable
from loradeck.cli.options import Activations, Adapters, AnyBase, AsJson, Dtype, SamplingOptions, System, Weights
from loradeck.cli.prompts import read_prompts, title, with_system
from loradeck.errors import ConfigError

GREEDY = SamplingOptions()


def generate(
    base: str,
    /,
    *prompts: str,
    file: Annotated[str | None, Parameter(name="--prompts", metavar="FILE")] = None,
    system: System = None,
    adapters: Adapters = (),
    any_base: AnyBase = False,
    sampling: SamplingOptions = GREEDY,
    batch_size: int = 32,
    dtype: Dtype = "auto",
    weights: Weights = "blocks",
    activations: Activations = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer prompts in batches, each with its own adapter.

    ADAPTER is a folder, a blend such as adapters/poet*0.7+adapters/pirate*0.3,
    or `none` for the base. Give one for all prompts, or one for each prompt in
    the same order. Prompts can also come through a pipe, one on each line.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        prompts: Prompts; `-` reads them from standard input. Put `--` before one that begins with a dash.
        file: A file of prompts: one on each line, or .jsonl with `prompt` or `messages` in each record.
        batch_size: Prompts that are answered at a time.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}", hint="Give 1 or more.")
    questions = read_prompts(prompts, file)
    names = [*(adapters or [blend.NONE])]
    if len(names) == 1:
        names *= len(questions)
    if len(names) != len(questions):
        raise ConfigError(
            f"the numbers of adapters and prompts differ: {len(adapters)} and {len(questions)}",
            hint="Give --adapter once for all prompts, or once for each; `none` is the base.",
        )
    files = blend.read(names)

    from rich.console import Console

    from loradeck import generation
    from loradeck.base.load import Base
    from loradeck.base.text import encode
    from loradeck.lora.bank import Bank

    cap_kernel_cache()
    answers: list[str] = []
    with Console(stderr=True).status(f"loading {printable(base)}") as status:
        loaded = Base.load(base, dtype=dtype, weights=weights)
        bank = Bank(loaded.model)
        entries = blend.load(bank, names, files, any_base=any_base)
        tokenizers = generation.tokenizers_of(loaded, bank, entries)
        pairs = zip(tokenizers, questions, strict=True)
        rows = [encode(tokenizer, with_system(prompt, system)) for tokenizer, prompt in pairs]
        generation.answer_length(loaded, rows, sampling.max_new_tokens)  # raises for all before the first is answered
        for start in range(0, len(rows), batch_size):
            done = f"{start} of {len(rows)} prompts answered"
            batch = slice(start, start + batch_size)
            seed = None if sampling.seed is None else sampling.seed + start
            options = asdict(replace(sampling, seed=seed))
            new = generation.generate(
                loaded,
                bank,
                rows[batch],
                entries[batch],
                **options,
                activations=activations,
                on_step=lambda count, done=done: status.update(f"{done}, {count} tokens of the next"),
            )
            answers += new
            if not as_json:
                pairs = zip(questions[batch], names[batch], strict=True)
                heads = [f"> {title(prompt)}  [{name}]\n" for prompt, name in pairs]
                _print(heads if len(rows) > 1 else [""], new, first=start == 0)
    if as_json:
        results = zip(questions, names, answers, strict=True)
        print_json([{"prompt": prompt, "adapter": name, "answer": answer} for prompt, name, answer in results])


def _print(heads: Sequence[str], answers: Sequence[str], *, first: bool) -> None:
    """Print answers with a line between them, also after those of the batch before."""
    text = "\n\n".join(head + answer for head, answer in zip(heads, answers, strict=True))
    print(printable(text if first else f"\n{text}"), flush=True)
