"""The adapters of a command line: a folder, a blend of folders, or `none`.

none · adapters/poet · adapters/poet*0.7+adapters/pirate*0.3
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loradeck.blend import parse_blend
from loradeck.lora.names import default_name

if TYPE_CHECKING:
    from loradeck.lora.bank import Bank

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


def check(texts: Iterable[str]) -> None:
    """Raise the errors of `load` that do not depend on the base, before the seconds that loading a base takes.

    Raises:
        ConfigError: invalid blend.
        AdapterError: a folder is not a complete adapter.
    """
    from loradeck.cli.adapter_folder import read_adapter

    for folder in dict.fromkeys(folder for text in texts for folder in parse(text)):
        read_adapter(folder)


def load(bank: "Bank", texts: Iterable[str], *, any_base: bool = False) -> list[Blend | None]:
    """Load each folder once; return the argument of `bank.route` for each text.

    An adapter is named as by `bank.load`, or `poet-2` if that name is taken. `any_base` is as in `bank.load`.

    Raises:
        ConfigError: invalid blend.
        LoradeckError: as `bank.load`.
    """
    names: dict[Path, str] = {}
    blends: list[Blend | None] = []
    for text in texts:
        blend: Blend = {}
        for folder, weight in parse(text).items():
            path = Path(folder).resolve()
            if path not in names:
                names[path] = bank.load(folder, _free_name(bank, default_name(path)), any_base=any_base)
            blend[names[path]] = blend.get(names[path], 0.0) + weight
        blends.append(blend or None)
    return blends


def _free_name(bank: "Bank", stem: str) -> str:
    name, number = stem, 1
    while name in bank:
        number += 1
        name = f"{stem}-{number}"
    return name
