"""`loradeck versions`: the versions of one adapter in a store, without torch."""

from dataclasses import asdict
from pathlib import Path

from loradeck.cli.display.text import print_json, printable
from loradeck.cli.options import AsJson
from loradeck.errors import AdapterError


def versions(name: Path, /, *, as_json: AsJson = False) -> None:
    """List the versions of an adapter, the latest last.

    Args:
        name: The name in a store, as in adapters/poet.
    """
    from loradeck.cli.ls import first_line, table
    from loradeck.cli.summary import Summary, summarise
    from loradeck.lora.manifest import read_folder
    from loradeck.store import AdapterStore, split_spec

    own, _ = split_spec(name.name)
    store = AdapterStore(name.parent)
    numbers = store.versions(own)
    summaries: list[Summary] = []
    broken: list[dict[str, str]] = []
    for number in numbers:
        folder = name.parent / store.path(own, number).name
        try:
            summaries.append(summarise(read_folder(folder)))
        except AdapterError as error:
            broken.append({"name": folder.name, "folder": str(folder), "error": first_line(error)})
    marks = [each.version == numbers[-1] for each in summaries]
    if as_json:
        rows = [{**asdict(each), "latest": mark} for each, mark in zip(summaries, marks, strict=True)]
        print_json({"name": own, "latest": numbers[-1], "versions": rows, "broken": broken})
        return
    if summaries:
        print(table(summaries, marks))
    for each in broken:
        print(printable(f"{each['name']} is invalid: {each['error']}"))
