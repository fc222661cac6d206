"""`loradeck convert`: an adapter in another program's format."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from loradeck.cli.adapter_folder import close_adapters, local
from loradeck.cli.display.text import format_size, printable
from loradeck.cli.output import check_writable
from loradeck.errors import AdapterError

if TYPE_CHECKING:
    from loradeck.conversion import Conversion

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank can be
TRY: Mapping[str, str] = {
    "peft": "loradeck generate {base} PROMPT --adapter {output}",
    "mlx": "mlx_lm.generate --model {base} --adapter-path {output} --prompt PROMPT",
    "gguf": "llama-cli -m BASE.gguf --lora {output}",
    "vllm": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={output}",
}


def convert(
    source: str,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    to: Literal["peft", "mlx", "gguf", "vllm"] = "peft",
    base: str | None = None,
    rank: int | None = None,
    initial: Path | None = None,
) -> None:
    """Convert an adapter to another program's format.

    Reads PEFT's folders, with safetensors or a pickle (which runs no code),
    mlx-lm's folders, and LoRA files of llama.cpp. An adapter whose
    initialisation changed its base (PiSSA, OLoRA) becomes a plain LoRA.

    Args:
        source: An adapter's folder, its .safetensors, .bin or .gguf file, or a hub id.
        output: A new folder; for gguf a new file.
        to: peft; vllm, which is PEFT's folder with one rank and one scaling; mlx, mlx-lm's folder; or
            gguf, llama.cpp's file, as `loradeck export` writes it.
        base: The adapter's base, by default the one that it names. It is needed from and to gguf, to
            undo PiSSA and OLoRA, and to compare copies of its weights that PEFT saved for the head
            and the embedding.
        rank: Lower higher ranks to this one, by SVD; the error is printed.
        initial: The adapter's folder as it was saved before training: CorDA, LoRA-GA and PiSSA by
            randomised SVD cannot be undone without it.
    """
    adapter = local(source)
    if not adapter.exists():
        raise AdapterError(f"{source} is not a folder or a file", hint=close_adapters(source))
    check_writable(output)

    from loradeck import conversion

    print_conversion(conversion.convert(adapter, output, to=to, base=base, rank=rank, initial=initial), to)


def print_conversion(done: "Conversion", to: str, *details: str) -> None:
    """Print what was written, the error of lowering its rank, and how to use it."""
    output, sites = done.output, done.adapter.sites
    nbytes = sum(file.stat().st_size for file in output.iterdir()) if output.is_dir() else output.stat().st_size
    ranks = sorted({site.r for site in sites.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    facts = [format_size(nbytes), rank, f"{len(sites)} modules", f"alpha {done.alpha:g}", *details]
    print(printable(f"{output}: {', '.join(facts)}"))
    if done.errors:
        worst = max(done.errors, key=done.errors.__getitem__)
        print(printable(f"error of the update: {done.error:.2%}; worst {done.errors[worst]:.2%}, of {worst}"))
    fields = {
        "base": shlex.quote(done.adapter.origin.base_model or "BASE"),
        "output": shlex.quote(str(output)),
        "name": shlex.quote(output.name),
        "rank": next((limit for limit in VLLM_RANKS if limit >= ranks[-1]), ranks[-1]),
    }
    print(printable("try: " + TRY[to].format(**fields)))
