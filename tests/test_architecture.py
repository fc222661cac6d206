"""The repository polices itself: imports go down, no circles, small files, plain names, docs that match the tree."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import loradeck

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "loradeck"
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in FILES}
# What each room may import of ours, besides itself, from the ground up.
GROUND = {"errors", "disk", "dtypes", "blend", "llamacpp", "hub", "tokenizer_files"}
MAY = {
    "errors": set(),
    "disk": set(),
    "dtypes": set(),
    "blend": {"errors"},
    "llamacpp": {"errors"},
    "hub": set(),
    "tokenizer_files": {"disk", "errors"},
    "sampling": {"native", "errors"},
    "toy": set(),
    "page": set(),
    "demo": set(),
    "ops": {"disk", "dtypes"},
    "lora": {"ops", *GROUND},
    "stored": {"lora", *GROUND},
    "backends": {"stored", "lora", *GROUND},
    "store": {"backends", "stored", "lora", *GROUND},
    "vllm_plugin": {"store", "lora", "base", *GROUND},
    "native": {"ops", *GROUND},
    "base": {"native", *GROUND},
    "pooling": {"runner", "lora", "base", *GROUND},
    "generation": {"runner", "lora", "base", "native", "sampling", *GROUND},
    "dataset": {"base", *GROUND},
    "train": {"dataset", "stored", "lora", "native", "ops", "base", *GROUND},
    "gguf": {"lora", "ops", "base", *GROUND},
    "conversion": {"gguf", "lora", "base", *GROUND},
    "evaluation": {"train", "generation", "dataset", "lora", "base", *GROUND},
    "runner": {"sampling", "lora", "base", "native", "ops", *GROUND},
    "serve": {"runner", "sampling", "store", "stored", "lora", "ops", "base", *GROUND},
    "live": {"serve", "train", "generation", "dataset", "store", "stored", "runner", "lora", "ops", "base", *GROUND},
    "api": {
        "live",
        "pooling",
        "evaluation",
        "dataset",
        "serve",
        "runner",
        "sampling",
        "store",
        "stored",
        "lora",
        "base",
        *GROUND,
    },
    "scale": {"api", "base", "blend", "errors"},
    "cli": {
        "scale",
        "api",
        "live",
        "evaluation",
        "conversion",
        "gguf",
        "serve",
        "store",
        "backends",
        "stored",
        "generation",
        "train",
        "dataset",
        "base",
        "lora",
        "ops",
        "toy",
        "demo",
        *GROUND,
    },
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, at its top, in functions and for type checkers."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "loradeck":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES or node.module == "loradeck" else str(node.module) for name in names}
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.split(".")[0] == "loradeck"}
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_only_go_down(path: Path) -> None:
    home = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if home in ("__init__", "__main__"):
        return
    upward = {module for module in imports(path) if room(module) not in MAY[home] | {home}}
    assert not upward


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {
        module: imports(path) & MODULES.keys() for module, path in MODULES.items() if module != "loradeck.__init__"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_files_are_small() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > 500} == {}


def test_names_mean_something() -> None:
    forbidden = {"utils", "helper", "misc"}
    assert not {
        path for path in FILES if forbidden & set(re.split(r"[_/]", str(path.relative_to(SOURCE).with_suffix(""))))
    }


def test_no_folder_of_one_file() -> None:
    for folder in {path.parent for path in FILES}:
        assert len([entry for entry in folder.iterdir() if entry.name not in ("__pycache__", "__init__.py")]) > 1


def test_the_public_names_are_sorted_and_there() -> None:
    assert loradeck.__all__ == sorted(loradeck.__all__)
    assert all(getattr(loradeck, name) is not None for name in loradeck.__all__)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        loradeck.nothing_of_that_name  # noqa: B018


def test_generate_is_the_function_whatever_was_imported_first() -> None:
    importlib.import_module("loradeck.generation")
    assert callable(loradeck.generate)


def test_importing_is_instant() -> None:
    code = "import sys, loradeck; sys.exit(str([m for m in ('torch', 'transformers') if m in sys.modules] or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_the_architecture_page_lists_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = {
        name: set(re.findall(r"`([\w.]+)`", files))
        for name, files in re.findall(r"^\| `([\w/.]+)` \| [^|]+ \| ([^|]+) \|$", page, flags=re.MULTILINE)
    }
    actual: dict[str, set[str]] = {}
    for path in (*FILES, *SOURCE.rglob("*.[ch]")):
        parts = path.relative_to(SOURCE).parts
        if path.name in ("__init__.py", "__main__.py"):
            continue
        folder = "/".join(parts[:-1] or ("loradeck",)) + "/"
        actual.setdefault(folder, set()).add(path.stem if path.suffix == ".py" else path.name)
    assert {name: listed.get(name, set()) for name in actual} == actual
    assert all((SOURCE / name).is_dir() for name in set(listed) - set(actual))


@pytest.mark.slow
def test_the_tables_are_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "report", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_run(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 30
    done = subprocess.run([sys.executable, "-W", "error", str(example)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
