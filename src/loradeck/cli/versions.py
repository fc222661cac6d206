"""`loradeck versions`: the versions of one adapter in a store, without torch."""

from dataclasses import replace
from pathlib import Path

from loradeck.cli.display.text import print_json, printable
from loradeck.cli.options import AsJson
from loradeck.errors import AdapterError


def versions(name: Path, /, *, as_json: AsJson = False) -> None:
    """List the versions of an adapter, the latest last.

    Args:
        name: The name in a store, as in adapters/poet.
    """
    from loradeck.cli import summary
    from loradeck.cli.ls import table
    from loradeck.lora.manifest import read_folder
    from loradeck.store import AdapterStore, is_store, split_spec

    if is_store(name):
        raise AdapterError(
            f"{name} is a folder of adapters", hint=f"Give one of them: `loradeck ls {name}` lists them."
        )
    own, _ = split_spec(name.name)
    store = AdapterStore(name.parent)
    numbers = store.versions(own)
    summaries: list[summary.Summary] = []
    broken: list[dict[str, str]] = []
    for number in numbers:
        folder = name.parent / store.path(own, number).name
        try:
            summaries.append(replace(summary.summarise(read_folder(folder)), latest=number == numbers[-1]))
        except AdapterError as error:
            broken.append(summary.broken(folder, error))
    if as_json:
        print_json({"name": own, "latest": numbers[-1], "versions": summaries, "broken": broken})
        return
    if summaries:
        print(table(summaries))
    for each in broken:
        print(printable(f"{each['name']} is invalid: {each['error']}"))
