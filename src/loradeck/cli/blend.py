"""What a user writes for an adapter: a folder, a blend of folders, or `none`. Knows folders and weights, no tensors.

none · adapters/poet · adapters/poet*0.7+adapters/pirate*0.3
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from loradeck.lora.bank import Bank

NONE = "none"
Blend: TypeAlias = dict[str, float]


def parse(text: str) -> Blend | None:
    """Return the folders of a blend with their weights, None for `none`.

    Raises:
        ConfigError: a part without a folder, or a weight that is no number.
    """
    if text == NONE:
        return None
    if Path(text).exists():  # whatever characters its name has
        return {text: 1.0}
    weights: Blend = {}
    for part in text.split("+"):
        folder, star, weight = part.strip().rpartition("*")
        folder, weight = (folder, weight) if star else (weight, "1")
        try:
            weights[folder] = weights.get(folder, 0.0) + float(weight)
        except ValueError:
            folder = ""
        if not folder:
            raise ConfigError(
                f"{text!r} is no blend: {part!r} is not FOLDER*WEIGHT",
                mend="Write it as in adapters/poet*0.7+adapters/pirate*0.3.",
            )
    return weights


def check(texts: Iterable[str]) -> None:
    """Refuse what `load` would refuse whatever the base, before the base is loaded: that takes seconds.

    Raises:
        ConfigError: a text is no blend.
        AdapterError: a folder is no adapter, or not a whole one.
    """
    from loradeck.lora.layout import read_folder

    for text in texts:
        for folder in parse(text) or ():
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
    for weights in [parse(text) for text in texts]:
        for folder in map(Path, weights or ()):
            if folder.resolve() not in names:
                names[folder.resolve()] = bank.load(folder, _free_name(bank, folder))
        entries.append(weights and {names[Path(folder).resolve()]: weight for folder, weight in weights.items()})
    return entries


def _free_name(bank: "Bank", folder: Path) -> str:
    own = folder.resolve().name
    name, number = own, 1
    while name in bank:
        number += 1
        name = f"{own}-{number}"
    return name
