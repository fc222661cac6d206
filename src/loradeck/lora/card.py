"""The model card (README.md) in an adapter's folder."""

import json
import re

from loradeck.lora.config import LoraConfig
from loradeck.lora.peft import Origin


def text(config: LoraConfig, origin: Origin, *, modules: int, nbytes: int, notes: str = "") -> str:
    """Return a model card in the hub's format, with notes (markdown).

    `modules` is the number of adapted modules, `nbytes` the size of the tensors.
    """
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    lines = ["---", "library_name: peft", "tags:", "- lora", "- loradeck"]
    if origin.base_model:
        lines.insert(1, f"base_model: {json.dumps(origin.base_model)}")  # text from a stranger, here and below
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
        f"| modules | {modules} |",
        f"| size | {nbytes / 1e6:.2f} MB |",
        *(f"| {cell(key)} | {cell(value)} |" for key, value in sorted(origin.provenance.items())),
        "",
        notes or "Use it with loradeck: `bank.load(folder)`, or with PEFT: `PeftModel.from_pretrained(base, folder)`.",
        "",
    ]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Return a text escaped for a table cell: no HTML, link or image."""
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return re.sub(r"[\\|<\[`*&]", r"\\\g<0>", plain)
