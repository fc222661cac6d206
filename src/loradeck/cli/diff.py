"""`loradeck diff`: how two adapters differ, in their settings, their modules and what they compute.

Settings and modules come from headers; torch is imported only to measure the updates.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from loradeck.cli.display.text import columns, print_json, shown, spelled
from loradeck.cli.options import AsJson


def diff(
    first: Path, second: Path, /, *, headers: bool = False, modules: bool = False, as_json: AsJson = False
) -> None:
    """Compare two adapters: settings, modules, and the distance of their updates.

    The distance is |D1 - D2| / |D1| in the Frobenius norm, where D = scaling B A
    is what an adapter adds to a weight: 0 for equal updates, about 1.4 for
    unrelated ones of the same size.

    Args:
        first: An adapter's folder.
        second: Another's.
        headers: Compare settings and modules only, which is instant.
        modules: List every module, not one line for each kind of module.
    """
    from loradeck.cli.summary import config, pattern
    from loradeck.lora.manifest import read_folder

    one, two = read_folder(first), read_folder(second)
    settings = _differences(
        {"base": one.origin.base_model, **config(one)}, {"base": two.origin.base_model, **config(two)}
    )
    only = {
        "first": [path for path in one.sites if path not in two.sites],
        "second": [path for path in two.sites if path not in one.sites],
    }
    if not as_json:
        rows = [(key, *map(spelled, both)) for key, both in settings.items()]
        print(columns([("setting", str(first), str(second)), *rows]) if rows else "the settings are equal")
        for which, folder in (("first", first), ("second", second)):
            for kind, count in Counter(map(pattern, only[which])).items():
                print(shown(f"only in {folder}: {kind} ({count})"))
        print(flush=True)  # importing torch takes a while
    if headers:
        if as_json:
            print_json({"settings": settings, "only": only})
        return

    from loradeck.cli.distance import distances

    each, overall = distances(one, two)
    if as_json:
        print_json({"settings": settings, "only": only, "distance": overall, "distances": each})
        return
    import statistics

    groups: dict[str, list[float]] = {}
    for path, distance in each.items():
        groups.setdefault(path if modules else pattern(path), []).append(distance)
    rows = [
        (group, f"{len(own)}", *(f"{f(own):.3g}" for f in (min, statistics.median, max)))
        for group, own in groups.items()
    ]
    if rows:
        print(columns([("distance", "modules", "least", "median", "most"), *rows], right=(1, 2, 3, 4)))
    print(f"distance over all modules: {overall:.3g}")


def _differences(one: dict[str, Any], two: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that are not equal, from both."""
    keys = dict.fromkeys([*one, *two])
    return {key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}
