"""`loradeck diff`: how two adapters differ in settings, modules and updates.

Settings and modules are read from headers; torch is imported only to measure the updates.
"""

from collections import Counter
from typing import Any

from loradeck.cli.display.text import columns, format_value, print_json, printable
from loradeck.cli.options import AsJson


def diff(first: str, second: str, /, *, headers: bool = False, modules: bool = False, as_json: AsJson = False) -> None:
    """Compare two adapters: their settings, modules and updates.

    The distance is |D1 - D2| / |D1| in the Frobenius norm, where D = scaling B A
    is the update that an adapter adds to a weight: 0 for equal updates, about
    1.4 for unrelated ones of the same size. Of a module that an adapter
    replaces (modules_to_save), D is the new weights.

    Args:
        first: An adapter's folder, or its URL in a store.
        second: Another adapter's.
        headers: Compare only settings and modules, which is instant.
        modules: Print a line for every module, not for every kind of module.
    """
    from loradeck.cli.adapter_folder import read_adapter
    from loradeck.cli.summary import config, pattern

    one, two = read_adapter(first), read_adapter(second)
    settings = _differences(
        {"base": one.origin.base_model, **config(one)}, {"base": two.origin.base_model, **config(two)}
    )
    only = {
        "first": [path for path in (*one.sites, *one.saved) if path not in {*two.sites, *two.saved}],
        "second": [path for path in (*two.sites, *two.saved) if path not in {*one.sites, *one.saved}],
    }
    if not as_json:
        rows = [(key, *map(format_value, values)) for key, values in settings.items()]
        print(columns([("setting", first, second), *rows]) if rows else "the settings are equal")
        for which, folder in (("first", first), ("second", second)):
            for kind, count in Counter(map(pattern, only[which])).items():
                print(printable(f"only in {folder}: {kind} ({count})"))
        print(flush=True)  # importing torch takes a second
    if headers:
        if as_json:
            print_json({"settings": settings, "only": only})
        return

    from loradeck.lora.distance import compare, overall

    compared = compare(one, two)
    by_module, distance_of_all = {each.path: each.distance for each in compared if each.shared}, overall(compared)
    if as_json:
        print_json({"settings": settings, "only": only, "distance": distance_of_all, "distances": by_module})
        return
    import statistics

    groups: dict[str, list[float]] = {}
    for path, distance in by_module.items():
        groups.setdefault(path if modules else pattern(path), []).append(distance)
    rows = [
        (group, f"{len(values)}", *(f"{f(values):.3g}" for f in (min, statistics.median, max)))
        for group, values in groups.items()
    ]
    if rows:
        print(columns([("distance", "modules", "least", "median", "most"), *rows], right=(1, 2, 3, 4)))
    print(f"distance over all modules: {distance_of_all:.3g}")


def _differences(one: dict[str, Any], two: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, each with both values."""
    keys = dict.fromkeys([*one, *two])
    return {key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}
