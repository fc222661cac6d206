"""`loradeck versions`: the versions of one adapter in a store, without torch."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loradeck.cli.display.text import print_json, printable
from loradeck.cli.options import AsJson
from loradeck.errors import AdapterError, LoradeckError

if TYPE_CHECKING:
    from loradeck.cli.summary import Summary
    from loradeck.store import AdapterStore


def versions(name: str, /, *, as_json: AsJson = False) -> None:
    """List the versions of an adapter, the latest last.

    Args:
        name: The name in a store, as in adapters/poet or s3://bucket/adapters/poet.
    """
    from loradeck.cli import summary
    from loradeck.cli.ls import table
    from loradeck.cli.store_name import StoreName
    from loradeck.store import AdapterStore, is_store, is_url, split_spec

    if is_url(name):
        target = StoreName.of(name)
        store, own, folder = target.store, split_spec(target.name)[0], None
    else:
        path = Path(name)
        if is_store(path):
            hint = f"Give one of them: `loradeck ls {name}` lists them."
            raise AdapterError(f"{name} is a folder of adapters", hint=hint)
        store, own, folder = AdapterStore(path.parent), split_spec(path.name)[0], path.parent
    lines = _in_store(store, own) if folder is None else _in_folder(store, own, folder)
    summaries = [line for line in lines.values() if isinstance(line, summary.Summary)]
    broken = [line for line in lines.values() if not isinstance(line, summary.Summary)]
    latest = max(lines)
    summaries = [replace(each, latest=each.version == latest) for each in summaries]
    if as_json:
        print_json({"name": own, "latest": latest, "versions": summaries, "broken": broken})
        return
    if summaries:
        print(table(summaries))
    for each in broken:
        print(printable(f"{each['name']} is invalid: {each['error']}"))


def _in_folder(store: "AdapterStore", name: str, place: Path) -> "dict[int, Summary | dict[str, str]]":
    from loradeck.cli import summary
    from loradeck.lora.manifest import read_folder

    lines: dict[int, Summary | dict[str, str]] = {}
    for number in store.versions(name):
        folder = place / store.path(name, number).name
        try:
            lines[number] = summary.summarise(read_folder(folder))
        except AdapterError as error:
            lines[number] = summary.broken(folder, error)
    return lines


def _in_store(store: "AdapterStore", name: str) -> "dict[int, Summary | dict[str, str]]":
    from loradeck.cli import summary

    return {
        number: summary.broken(f"{store.location}/{name}@{number}", version)
        if isinstance(version, LoradeckError)
        else summary.summarise_stored(version, store.location)
        for number, version in store.listed(name).items()
    }
