"""`loradeck ls`: which adapters lie in a folder. Reads headers; imports no torch."""

from pathlib import Path

from loradeck.cli.options import AsJson
from loradeck.cli.screen import columns, few, print_json, shown, size
from loradeck.errors import AdapterError


def ls(folder: Path = Path("adapters"), /, *, as_json: AsJson = False) -> None:
    """List the adapters in a folder.

    An adapter that cannot be used is listed with the reason.

    Args:
        folder: A folder of adapters, or one adapter.
    """
    from loradeck.cli.summary import Summary, summary
    from loradeck.lora.manifest import is_adapter, read_folder

    found: list[Summary] = []
    broken: list[dict[str, str]] = []
    for path in _candidates(folder):
        try:
            if is_adapter(path):
                found.append(summary(read_folder(path)))
        except AdapterError as error:
            reason = str(error).partition("\n")[0]
            broken.append({"name": path.resolve().name, "folder": str(path), "error": reason})
    if as_json:
        print_json({"adapters": found, "broken": broken})
        return
    if found:
        head = ("name", "r", "alpha", "targets", "modules", "parameters", "size", "base")
        rows = [
            (
                each.name,
                few(each.r, 3),
                f"{each.lora_alpha:g}",
                few(each.targets, 2),
                f"{each.modules}",
                f"{each.parameters:,}",
                size(each.bytes),
                each.base or "not recorded",
            )
            for each in found
        ]
        print(columns([head, *rows], right=(1, 2, 4, 5, 6)))
    elif not broken:
        print(f"no adapters in {folder}")
    for each in broken:
        print(shown(f"{each['name']} cannot be used: {each['error']}"))


def _candidates(folder: Path) -> list[Path]:
    """Return the folder and what lies in it, but for hidden folders: those are half written or half removed."""
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except NotADirectoryError:
        raise AdapterError(f"{folder} is a file", hint="Name the folder in which your adapters lie.") from None
    except FileNotFoundError:
        raise AdapterError(
            f"there is no folder {folder}", hint="Name one, or make one with `loradeck demo` or `loradeck train`."
        ) from None
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read: {error.strerror}") from error
    return [folder, *inside]
