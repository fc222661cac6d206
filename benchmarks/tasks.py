"""The tasks of the quality suite: prompts and answers from installed packages.

No number, country or module of the validation and test splits is in the training split.
"""

import ast
import random
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

Pair = tuple[str, str]
TRAIN, VALID, TEST = 128, 96, 192
SIGNATURE, LINE = 44, 64  # characters; longer functions are left out to save time


@dataclass(frozen=True)
class Task:
    """Questions of one kind, in three splits."""

    name: str
    what: str
    source: str
    exact: bool
    """Whether an answer is right or wrong; else only its loss counts."""
    train: Sequence[Pair]
    valid: Sequence[Pair]
    test: Sequence[Pair]


def number_words() -> Task:
    from num2words import num2words

    numbers = random.Random(0).sample(range(100, 1000), TRAIN + VALID + TEST)
    return Task(
        "number words",
        "A number from 100 to 999, in Italian words; the numbers of the test are not those of the training.",
        f"num2words {version('num2words')}, LGPL",
        True,
        *_split([[(f"{number}:", str(num2words(number, lang="it")))] for number in numbers]),
    )


FACTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "capital": lambda country: country["capital"],
    "demonym": lambda country: country["demonym"],
    "code": lambda country: country["ISO"]["alpha3"],
    "domain": lambda country: country["tld"][0],
}


def country_facts() -> Task:
    import countryinfo

    countries = {country["name"]: country for country in (each.info() for each in countryinfo.all_countries())}
    names = sorted(
        name
        for name, country in countries.items()
        if all(country.get(key) for key in ("capital", "demonym", "ISO", "tld"))
    )
    random.Random(0).shuffle(names)
    return Task(
        "country facts",
        f"A country's {', '.join(FACTS)}; the countries of the test are not those of the training.",
        f"countryinfo {version('countryinfo')}, MIT",
        True,
        *_split(
            [[(f"{name}, {fact}:", fact_of(countries[name])) for fact, fact_of in FACTS.items()] for name in names]
        ),
    )


def docstrings() -> Task:
    seen: set[str] = set()  # one line can describe functions of several modules
    modules = [_functions(file, seen) for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    random.Random(0).shuffle(modules)
    return Task(
        "docstrings",
        "The first line of a function's docstring, from its signature; the modules of the test are not those of the "
        "training.",
        f"the standard library of Python {python_version()}, PSF licence",
        False,
        *_split(modules),
    )


TASKS: Mapping[str, Callable[[], Task]] = {
    "number words": number_words,
    "country facts": country_facts,
    "docstrings": docstrings,
}


def _functions(file: Path, seen: set[str]) -> list[Pair]:
    """Return the signatures and first lines of the public functions of a module, each line once."""
    pairs: list[Pair] = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if len(signature) <= SIGNATURE and 0 < len(line) <= LINE and line not in seen:
                seen.add(line)
                pairs.append((signature, line))
    return pairs


def _split(groups: Sequence[Sequence[Pair]]) -> tuple[list[Pair], ...]:
    """Put whole groups into the splits, in order, and cut each to its size."""
    rest = iter(groups)
    splits: list[list[Pair]] = []
    for size in (TRAIN, VALID, TEST):
        split: list[Pair] = []
        while len(split) < size:
            split += next(rest)
        splits.append(split[:size])
    return tuple(splits)
