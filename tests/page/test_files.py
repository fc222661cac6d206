"""The page's files: small, typed, and without a way for a stranger's text to become markup or to be run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loradeck.api.page import page_files

HERE = Path(__file__).parent
FOLDER = HERE.parent.parent / "src" / "loradeck" / "page"
MODULES = sorted(FOLDER.glob("*.js"))
MAX_BYTES = 150_000
MARKUP = re.compile(
    r"\b(innerHTML|outerHTML|insertAdjacentHTML|setHTMLUnsafe|createContextualFragment|DOMParser|document\.write|eval|"
    r"Function|cssText|srcdoc)\b|setAttribute\(\s*[\"']style"
)
IMPORTS = re.compile(r"""(?:from\s+|import\(\s*|^import\s+)["']([^"']+)["']""", re.MULTILINE)


def test_all_files_together_are_small_as_they_are_sent() -> None:
    sizes = {name: len(file.compressed) for name, file in page_files().items()}
    assert sum(sizes.values()) <= MAX_BYTES, sizes


def test_every_file_is_served() -> None:
    files = {path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    assert page_files().keys() == files


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_text_becomes_markup_or_code(path: Path) -> None:
    code = re.sub(r"/\*.*?\*/|^\s*//[^\n]*", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not MARKUP.search(code), MARKUP.search(code)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_import_modules_of_the_page(path: Path) -> None:
    for name in IMPORTS.findall(path.read_text()):
        assert name.startswith("./"), name
        assert (FOLDER / name).is_file(), name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_say_what_they_are(path: Path) -> None:
    assert path.read_text().startswith("/**")
    assert len(path.read_text().splitlines()) <= 500


def test_the_page_names_its_own_files_only() -> None:
    page = (FOLDER / "index.html").read_text()
    names = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert names
    assert all(name.startswith("page/") and (FOLDER / name.removeprefix("page/")).is_file() for name in names), names
    assert "style=" not in page
    assert not re.search(r"\son[a-z]+=", page)


def test_its_types_fit() -> None:
    compiler = HERE / "node_modules" / "typescript" / "bin" / "tsc"
    node = shutil.which("node")
    if node is None or not compiler.is_file():
        pytest.skip("needs TypeScript, which make test installs where npm is")
    done = subprocess.run([node, compiler, "-p", HERE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
