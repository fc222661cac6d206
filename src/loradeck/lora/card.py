"""The README.md that lies in an adapter's folder. Knows the hub's card format; knows no training."""

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loradeck.lora.adapter import Adapter


def text(adapter: "Adapter", notes: str = "") -> str:
    """Return a model card in the hub's form, from what the adapter knows of itself, and notes (markdown)."""
    config, origin = adapter.config, adapter.origin
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    lines = ["---", "library_name: peft", "tags:", "- lora", "- loradeck"]
    if origin.base_model:
        lines.insert(1, f"base_model: {json.dumps(origin.base_model)}")  # a stranger's text, here and below
    lines += [
        "---",
        "",
        "# A LoRA adapter",
        "",
        "| | |",
        "|---|---|",
        f"| base | {cell(origin.base_model or 'not recorded')} |",
        f"| r, lora_alpha | {config.r}, {config.lora_alpha:g}{' (rank-stabilised)' if config.use_rslora else ''} |",
        f"| targets | {cell(targets)} |",
        f"| modules | {len(adapter.sites)} |",
        f"| size | {adapter.nbytes / 1e6:.2f} MB |",
        *(f"| {cell(key)} | {cell(value)} |" for key, value in sorted(origin.provenance.items())),
        "",
        notes or "Use it with loradeck: `bank.load(folder)`, or with PEFT: `PeftModel.from_pretrained(base, folder)`.",
        "",
    ]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Return a text that stays in its cell and forms no HTML, link or image."""
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return re.sub(r"[\\|<\[`*&]", r"\\\g<0>", plain)
