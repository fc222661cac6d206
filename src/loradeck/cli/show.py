"""`loradeck show`: one adapter, from its headers; torch is needed only to compare a tokenizer."""

from loradeck.cli.display.text import columns, format_size, format_value, print_json, printable
from loradeck.cli.options import AsJson


def show(adapter: str, /, *, base: str | None = None, as_json: AsJson = False) -> None:
    """Show an adapter: its settings, modules and provenance, and its training's results.

    If its folder has a tokenizer or a chat template of its own, which its rows
    use, it also says where they differ from those of the base.

    Args:
        adapter: An adapter's folder, or its name in a store, as in adapters/poet or s3://bucket/adapters/poet.
        base: The base whose tokenizer is compared; by default the one that the adapter names, if it is a local path.
    """
    from loradeck.cli.adapter_folder import read_adapter
    from loradeck.cli.adapter_tokenizer import AdapterTokenizer
    from loradeck.cli.summary import config, kinds, locate, summarise, whole_weights

    listing = read_adapter(locate(adapter))
    head, groups, settings = summarise(listing), kinds(listing.sites.items()), config(listing)
    dtypes = sorted({entry.dtype for _, entry in listing.entries.values()})
    tokenizer = AdapterTokenizer.of(listing, base)
    whole = whole_weights(listing)
    provenance = dict(sorted(listing.origin.provenance.items()))
    labels = listing.origin.labels
    if as_json:
        print_json(
            {
                "name": head.name,
                "folder": head.folder,
                "version": head.version,
                "date": head.date,
                "base": head.base,
                "parameters": head.parameters,
                "bytes": head.bytes,
                "dtypes": dtypes,
                "config": settings,
                "tokenizer": tokenizer.as_json,
                "kinds": groups,
                "whole_weights": whole,
                "labels": labels,
                "results": head.results,
                "provenance": provenance,
            }
        )
        return
    print(printable(head.name))
    facts = {
        "base": head.base or "not recorded",
        "size": f"{format_size(head.bytes)}: {head.parameters:,} parameters in {', '.join(dtypes)}, "
        f"{head.modules} modules",
        "written": head.date,
        **tokenizer.facts,
        **{key: format_value(value) for key, value in settings.items()},
        **provenance,
        **({"labels": f"{len(labels)}: {format_value(labels)}"} if labels else {}),
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
    if whole:
        shapes = [(path, name, f"{shape}") for path, names in whole.items() for name, shape in names.items()]
        print()
        print(columns([("whole module", "parameter", "shape"), *shapes]))
