"""What an adapter may be called. Knows text only."""

from loradeck.errors import AdapterNameError

RESERVED = '/\\@*+:,"<>|?='  # paths, versions (name@2), blends (a*0.7+b*0.3), and what some file systems refuse
MAX_NAME = 128


def check_name(name: str) -> None:
    """Refuse a name that could leave its folder, or be read as something else.

    Raises:
        AdapterNameError: says which character or rule.
    """
    problem = ""
    if not isinstance(name, str) or not name or name.strip() != name:
        problem = "is empty, or begins or ends with a space"
    elif name.startswith("."):
        problem = "begins with a dot"
    elif len(name) > MAX_NAME:
        problem = f"has more than {MAX_NAME} characters"
    elif bad := next((c for c in name if c in RESERVED or not c.isprintable()), None):
        problem = f"has the character {bad!r}"
    if problem:
        raise AdapterNameError(
            f"the name {str(name)[:MAX_NAME]!r} {problem}",
            hint="Take letters, digits, '.', '_' and '-': bank.load(folder, name=…).",
        )
