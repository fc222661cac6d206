"""`loradeck show`: all that an adapter's files say of it. Reads headers; imports no torch."""

from pathlib import Path

from loradeck.cli.display.text import columns, print_json, shown, size, spelled
from loradeck.cli.options import AsJson


def show(adapter: Path, /, *, as_json: AsJson = False) -> None:
    """Show one adapter: its settings, its modules, and where it comes from.

    Args:
        adapter: An adapter's folder.
    """
    from loradeck.cli.summary import config, kinds, summary
    from loradeck.lora.manifest import read_folder

    listing = read_folder(adapter)
    head, groups, settings = summary(listing), kinds(listing.sites.items()), config(listing)
    dtypes = sorted({entry.dtype for _, entry in listing.entries.values()})
    provenance = dict(sorted(listing.origin.provenance.items()))
    if as_json:
        print_json(
            {
                "name": head.name,
                "folder": head.folder,
                "base": head.base,
                "parameters": head.parameters,
                "bytes": head.bytes,
                "dtypes": dtypes,
                "config": settings,
                "kinds": groups,
                "provenance": provenance,
            }
        )
        return
    print(shown(head.name))
    facts = {
        "base": head.base or "not recorded",
        "size": f"{size(head.bytes)}: {head.parameters:,} parameters in {', '.join(dtypes)}, {head.modules} modules",
        **{key: spelled(value) for key, value in settings.items()},
        **provenance,
    }
    print(columns([(f"  {key}", value) for key, value in facts.items()]))
    print()
    rows = [
        (
            kind.modules,
            f"{kind.count}",
            kind.kind,
            f"{kind.r}",
            f"{kind.scaling:g}",
            f"{kind.a_shape}",
            f"{kind.b_shape}",
        )
        for kind in groups
    ]
    print(columns([("modules", "count", "kind", "r", "scaling", "A", "B"), *rows], right=(1, 3, 4)))
