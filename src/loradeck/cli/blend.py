"""The adapters of a command line: a folder, a blend of folders, or `none`.

none · adapters/poet · adapters/poet*0.7+adapters/pirate*0.3
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loradeck.blend import parse_blend
from loradeck.lora.names import default_name

if TYPE_CHECKING:
    from loradeck.lora.bank import Bank
    from loradeck.lora.manifest import AdapterFiles

NONE = "none"
Blend: TypeAlias = dict[str, float]


def parse(text: str) -> Blend:
    """Return the weight of each folder of a blend, or of each name on a server; `none` has none.

    Raises:
        ConfigError: invalid blend.
    """
    if text == NONE:
        return {}
    if os.path.exists(text):  # noqa: PTH110 - Path.exists raises for an invalid path
        return {text: 1.0}
    blend: Blend = {}
    for folder, weight in parse_blend(text):
        blend[folder] = blend.get(folder, 0.0) + weight
    return blend


def read(texts: Iterable[str]) -> "dict[str, AdapterFiles]":
    """Return the headers of the adapters of some texts, by their folders or hub ids as the texts have them.

    It raises the errors of `load` that do not depend on the base, before the seconds that loading a base takes.

    Raises:
        ConfigError: invalid blend.
        AdapterError: a folder is not a complete adapter.
    """
    from loradeck.cli.adapter_folder import read_adapter

    return {folder: read_adapter(folder) for folder in dict.fromkeys(each for text in texts for each in parse(text))}


def load(
    bank: "Bank", texts: Iterable[str], files: "Mapping[str, AdapterFiles]", *, any_base: bool = False
) -> list[Blend | None]:
    """Load each folder once; return the argument of `bank.route` for each text.

    `files` are what `read` returned. An adapter is named as by `bank.load`, or `poet-2` if that name is taken.
    `any_base` is as in `bank.load`.

    Raises:
        ConfigError: invalid blend.
        LoradeckError: as `bank.load`.
    """
    names: dict[Path, str] = {}
    blends: list[Blend | None] = []
    for text in texts:
        blend: Blend = {}
        for folder, weight in parse(text).items():
            path = files[folder].folder.resolve()
            if path not in names:
                name = _free_name(bank, default_name(Path(folder).resolve()))
                names[path] = bank.load(files[folder].folder, name, any_base=any_base)
            blend[names[path]] = blend.get(names[path], 0.0) + weight
        blends.append(blend or None)
    return blends


def _free_name(bank: "Bank", stem: str) -> str:
    name, number = stem, 1
    while name in bank:
        number += 1
        name = f"{stem}-{number}"
    return name
