"""The texts of errors, and that each hint is in the words of the door where it is shown."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import loradeck
from loradeck.errors import SHOWN, BusyError, ConfigError, LoradeckError

SOURCE = Path(loradeck.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
# Commands of the shell, for every door, and of the chat.
COMMAND = re.compile(r"python -c \".*\"|pip install .*|/blend .*", re.DOTALL)
PYTHON = re.compile(r"\w\(|\b\w+=\S|\b(bank|base|engine|torch|adapter)\.[a-z_]+|\b(None|True|False)\b|\bdef |\bimport ")
FLAG = re.compile(r"(?<!\S)[(`']?--?[a-z]")


def text_of(node: ast.expr) -> str:
    """Return the text of a string, with X for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "X" for part in node.values)
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "\n".join(text_of(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def keywords(name: str) -> Iterator[tuple[Path, ast.expr]]:
    """Yield what is passed as an argument of this name, of any call."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield from ((path, keyword.value) for keyword in node.keywords if keyword.arg == name)


def hints(name: str) -> Iterator[tuple[Path, int, str]]:
    """Yield file, line and text of every hint, also of those that are named before they are passed."""
    names = {"RETRAIN", "CONVERT"}  # passed by way of a table
    for path, value in keywords(name):
        names |= {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
        yield path, value.lineno, text_of(value)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr):
                assigned = {to.id for to in node.targets if isinstance(to, ast.Name)}
                if assigned & names and text_of(node.value) != "None":
                    yield path, node.lineno, text_of(node.value)


def wrong(name: str, pattern: re.Pattern[str], *, outside: str = "") -> list[str]:
    """Return the hints that speak the words of another door."""
    return [
        f"{path.relative_to(SOURCE)}:{line}: {text}"
        for path, line, text in hints(name)
        if not (outside and path.is_relative_to(SOURCE / outside)) and pattern.search(COMMAND.sub("", text))
    ]


def test_hints_for_every_door_have_no_python() -> None:
    assert len([*hints("hint")]) > 100
    assert wrong("hint", PYTHON, outside="api") == []  # api's own hints are for HTTP: JSON and TOML


def test_hints_for_every_door_have_no_flags() -> None:
    assert wrong("hint", FLAG, outside="cli") == []


def test_hints_for_one_door_are_in_its_words() -> None:
    assert [*hints("python")]
    assert [*hints("cli")]
    assert wrong("cli", PYTHON) == []
    assert wrong("python", FLAG) == []


def test_a_hint_that_ends_with_a_colon_goes_on_at_every_door() -> None:
    arguments = [
        {keyword.arg: keyword.value for keyword in node.keywords}
        if isinstance(node, ast.Call)
        else {text_of(key): value for key, value in zip(node.keys, node.values, strict=True) if key is not None}
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call | ast.Dict)
    ]
    begun = [each for each in arguments if "hint" in each and text_of(each["hint"]).endswith(":")]
    assert begun
    assert [each for each in begun if not {"python", "cli", "http"} <= {*each}] == []


def test_a_hint_is_shown_in_the_words_of_the_door() -> None:
    error = ConfigError("no", hint="Give one.", python="Pass x=1.", cli="Add --x 1.", http='Send "x": 1.')
    assert str(error) == error.text("python") == "no\nGive one. Pass x=1."
    assert error.text("cli") == error.report() == "no\nGive one. Add --x 1."
    assert error.text("http") == 'no\nGive one. Send "x": 1.'
    assert str(LoradeckError("no", cli="Add --x.")) == "no"


@pytest.mark.parametrize("count", [1, 2, SHOWN + 3])
def test_problems_are_shown_up_to_a_number(count: int) -> None:
    error = ConfigError("no", [f"p{i}" for i in range(count)], hint="Try.")
    assert error.report().count("\n") == (min(count, SHOWN) + (count > SHOWN) if count > 1 else 0) + 1
    assert str(error).splitlines()[0].startswith("no: p0")
    assert ("and 3 more" in str(error)) == (count > SHOWN)


def test_a_busy_engine_says_when_to_try_again() -> None:
    assert str(BusyError("full", retry_after=2.0)) == "full\nTry again in 2 s."
