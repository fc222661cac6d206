"""`loradeck ls`: the adapters in a folder, from their headers, without torch."""

from pathlib import Path

from loradeck.cli.display.text import columns, format_list, format_size, print_json, printable
from loradeck.cli.options import AsJson
from loradeck.errors import AdapterError


def ls(folder: Path = Path("adapters"), /, *, as_json: AsJson = False) -> None:
    """List the adapters in a folder.

    An invalid adapter is listed with the reason.

    Args:
        folder: A folder of adapters, or one adapter.
    """
    from loradeck.cli.summary import Summary, summarise
    from loradeck.lora.manifest import is_adapter, read_folder

    summaries: list[Summary] = []
    broken: list[dict[str, str]] = []
    for path in _candidates(folder):
        try:
            if is_adapter(path):
                summaries.append(summarise(read_folder(path)))
        except AdapterError as error:
            reason = str(error).partition("\n")[0]
            broken.append({"name": path.resolve().name, "folder": str(path), "error": reason})
    if as_json:
        print_json({"adapters": summaries, "broken": broken})
        return
    if summaries:
        head = ("name", "r", "alpha", "targets", "modules", "parameters", "size", "base")
        rows = [
            (
                each.name,
                format_list(each.r, 3),
                f"{each.lora_alpha:g}",
                format_list(each.targets, 2),
                f"{each.modules}",
                f"{each.parameters:,}",
                format_size(each.bytes),
                each.base or "not recorded",
            )
            for each in summaries
        ]
        print(columns([head, *rows], right=(1, 2, 4, 5, 6)))
    elif not broken:
        print(f"no adapters in {folder}")
    for each in broken:
        print(printable(f"{each['name']} is invalid: {each['error']}"))


def _candidates(folder: Path) -> list[Path]:
    """Return the folder and its subfolders, except hidden ones, which are being written or removed."""
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except NotADirectoryError:
        raise AdapterError(f"{folder} is a file", hint="Give the folder that contains your adapters.") from None
    except FileNotFoundError:
        raise AdapterError(
            f"no folder {folder}", hint="Give another, or make one with `loradeck demo` or `loradeck train`."
        ) from None
    except OSError as error:
        raise AdapterError(f"cannot read {folder}: {error.strerror}") from error
    return [folder, *inside]
