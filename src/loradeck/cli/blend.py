"""What a user writes for an adapter: a folder, a blend of folders, or `none`. Knows folders and weights, no tensors.

none · adapters/poet · adapters/poet*0.7+adapters/pirate*0.3
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from loradeck.lora.bank import Bank

NONE = "none"
Blend: TypeAlias = dict[str, float]


def parse(text: str) -> list[tuple[str, float]]:
    """Return the folders of a blend, each with its weight; `none` has no folder.

    Raises:
        ConfigError: a part without a folder, or a weight that is no number.
    """
    if text == NONE:
        return []
    if os.path.exists(text):  # noqa: PTH110 - Path.exists raises for what can be no name
        return [(text, 1.0)]
    return [_part(text, part.strip()) for part in text.split("+")]


def _part(text: str, part: str) -> tuple[str, float]:
    folder, star, weight = part.rpartition("*")
    folder, weight = (folder, weight) if star else (part, "1")
    with contextlib.suppress(ValueError):
        if folder:
            return folder, float(weight)
    raise ConfigError(
        f"{text!r} is no blend: {part!r} is not FOLDER*WEIGHT",
        hint="Write it as in adapters/poet*0.7+adapters/pirate*0.3.",
    )


def check(texts: Iterable[str]) -> None:
    """Refuse what `load` would refuse whatever the base, before the base is loaded: that takes seconds.

    Raises:
        ConfigError: a text is no blend.
        AdapterError: a folder is no adapter, or not a whole one.
    """
    from loradeck.lora.manifest import read_folder

    for text in texts:
        for folder, _ in parse(text):
            read_folder(folder)


def load(bank: "Bank", texts: Iterable[str]) -> list[Blend | None]:
    """Load every folder that is named, once, and return for each text what `bank.route` takes.

    An adapter is named as its folder, or `poet-2` where that is taken.

    Raises:
        ConfigError: a text is no blend.
        LoradeckError: what `bank.load` raises.
    """
    names: dict[Path, str] = {}
    entries: list[Blend | None] = []
    for text in texts:
        entry: Blend = {}
        for folder, weight in parse(text):
            path = Path(folder).resolve()
            if path not in names:
                names[path] = bank.load(folder, _free_name(bank, path.name))
            entry[names[path]] = entry.get(names[path], 0.0) + weight
        entries.append(entry or None)
    return entries


def _free_name(bank: "Bank", own: str) -> str:
    name, number = own, 1
    while name in bank:
        number += 1
        name = f"{own}-{number}"
    return name
