"""Which names an adapter can have, and the one that a folder gives it."""

from pathlib import Path

from loradeck.errors import AdapterNameError

RESERVED = '/\\@*+:,"<>|?='  # paths, versions (name@2), blends (a*0.7+b*0.3), and what some file systems reject
MAX_NAME = 128


def check_name(name: str) -> None:
    """Reject a name that could leave its folder, or be parsed as something else.

    Raises:
        AdapterNameError: names the character or rule.
    """
    problem = ""
    if not isinstance(name, str) or not name or name.strip() != name:
        problem = "is empty, or starts or ends with a space"
    elif name.startswith("."):
        problem = "starts with a dot"
    elif len(name) > MAX_NAME:
        problem = f"has more than {MAX_NAME} characters"
    elif bad := next((c for c in name if c in RESERVED or not c.isprintable()), None):
        problem = f"has the character {bad!r}"
    if problem:
        raise AdapterNameError(
            f"invalid name: {str(name)[:MAX_NAME]!r} {problem}",
            hint="Use letters, digits, '.', '_' and '-' in the name.",
        )


def valid_name(name: str) -> str:
    """Return a valid name that is close to an invalid one."""
    plain = "".join("-" if c in RESERVED or not c.isprintable() else c for c in name)
    return plain.strip(" .")[:MAX_NAME].rstrip(" .") or "adapter"


def default_name(folder: Path) -> str:
    """Return the name of a folder's adapter: `poet` for poet, and for its stored version poet@2.

    Raises:
        OSError, ValueError, RuntimeError: the path cannot be resolved.
    """
    name = folder.resolve().name
    return name.partition("@")[0] or name
