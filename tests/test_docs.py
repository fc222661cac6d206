"""The pages are true: links lead somewhere, code runs, pictures are as drawn, and the invariants' tests exist."""

import ast
import contextlib
import io
import json
import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt

from loradeck import Bank, LoraConfig
from loradeck.base.load import Base

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
NOTEBOOK = ROOT / "examples" / "lora_from_scratch.ipynb"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")


def prose(page: Path) -> str:
    """Return a page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return {f"{slug}-{slugs[:at].count(slug)}" if slug in slugs[:at] else slug for at, slug in enumerate(slugs)}


def broken(links: list[str], folder: Path, page: Path) -> list[str]:
    """Return the relative links that lead nowhere."""
    wrong = []
    for link in links:
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path = folder / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    assert broken([one or other for one, other in LINK.findall(prose(page))], page.parent, page) == []


def test_a_link_that_leads_nowhere_is_found() -> None:
    links = ["README.md", "README.md#install", "#install", "README.md#nowhere", "docs/nothing.md", "https://a.example"]
    assert broken(links, ROOT, README) == ["README.md#nowhere", "docs/nothing.md"]


def test_every_page_is_linked() -> None:
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = {
            (page.parent / link.partition("#")[0]).resolve() for pair in LINK.findall(prose(page)) for link in pair
        }
        waiting += [path for path in links & set(PAGES) if path not in reached]
    assert set(PAGES) - reached == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_named_in_a_page_exist(page: Path) -> None:
    names = re.findall(r"`([\w/]+/[\w/]+\.(?:py|c|json|ipynb))`", FENCE.sub("", page.read_text(encoding="utf-8")))
    assert [name for name in names if not any((ROOT / folder / name).exists() for folder in ("", "src/loradeck"))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)


@pytest.fixture
def at_hand(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """The base that the pages' Python loads, in a folder of its own."""
    monkeypatch.setattr(Base, "load", lambda name: base)
    monkeypatch.chdir(tmp_path)
    return base


def test_the_readmes_python_runs(at_hand: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = Bank(at_hand.model)
    bank.add("pirate", LoraConfig(r=2))
    bank.save("pirate", tmp_path / "adapters" / "pirate")
    bank.detach()
    prompts = {"input_ids": torch.arange(3, 15).reshape(3, 4), "attention_mask": torch.ones(3, 4, dtype=torch.int64)}
    names: dict[str, Any] = {"three_prompts": prompts}
    seven_lines, answers = blocks(README, "python")
    exec(compile(seven_lines, README, "exec"), names)
    assert names["y"].logits.shape == (3, 4, 260)
    assert (tmp_path / "adapters" / "poet" / "adapter_model.safetensors").exists()
    exec(compile(answers, README, "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.usefixtures("at_hand")
def test_the_trainers_example_runs_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "training.md"
    (example,) = (block for block in blocks(page, "python") if "Trainer(" in block)
    exec(compile(example, page, "exec"), {})
    out = capsys.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("Step(")]
    assert sum("job='pirate'" in step for step in steps) == 20
    assert sum("job='polite'" in step for step in steps) == 5
    assert (tmp_path / "adapters" / "pirate" / "adapter_model.safetensors").exists()


def test_the_example_makes_the_calls_of_the_seven_lines() -> None:
    def calls(code: str) -> set[str]:
        return {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}

    example = (ROOT / "examples" / "seven_lines.py").read_text(encoding="utf-8")
    assert calls(blocks(README, "python")[0]) - calls(example) == {"model"}  # the example's base is a plain module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_flags_they_show(page: Path) -> None:
    manual = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for code in blocks(page, "sh"):
        for line in re.findall(r"\bloradeck (.+)", code.replace("\\\n", " ")):
            verb, *words = line.partition("  #")[0].split()
            section = re.search(rf"^## loradeck {verb}$(.*?)(?=^## |\Z)", manual, flags=re.MULTILINE | re.DOTALL)
            assert section, line
            flags = {word for word in words if re.fullmatch(r"--[a-z-]+|-[a-z]", word)}
            assert flags - set(re.findall(r"(?<![\w-])-{1,2}[a-z][a-z-]*", section[1])) == set(), line


def test_the_pictures_are_as_drawn() -> None:
    pictures = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))["pictures"]()
    for path, text in pictures.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/make_pictures.py"
    assert {*(ROOT / "docs" / "pictures").glob("*.svg")} == set(pictures)


@pytest.mark.slow
def test_the_tests_of_the_invariants_exist() -> None:
    page = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")
    references = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", page)
    assert [int(number) for number in re.findall(r"^## (\d+)\.", page, flags=re.MULTILINE)] == [*range(1, 9)]
    assert all("`tests/" in section for section in page.split("\n## ")[1:])
    missing = []
    for file, name in references:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8")) if (ROOT / file).exists() else ast.Module([], [])
        body = tree.body
        for part in name.split("::"):
            body = next((getattr(node, "body", []) for node in body if getattr(node, "name", "") == part), [])
        if not body:
            missing.append(f"{file}::{name}")
    assert missing == []


# ---- the notebook


def cells(*, real: bool) -> list[dict[str, Any]]:
    """Return the notebook's code cells: those that need the real base, or the others."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in code if ("real" in cell["metadata"].get("tags", ())) == real]


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def run(code: list[dict[str, Any]]) -> list[str]:
    """Run cells in one namespace, as Jupyter does, and return what each printed."""
    backend, names, outputs = mpl.get_backend(), dict[str, Any](), list[str]()
    mpl.use("agg")
    try:
        for cell in code:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}:{cell['id']}", "exec"), names)
            outputs.append(output.getvalue())
    finally:
        plt.close("all")
        mpl.use(backend)
    return outputs


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_notebook_prints_what_it_shows() -> None:
    code = cells(real=False)
    assert run(code) == [printed(cell) for cell in code]


@pytest.mark.real
@pytest.mark.usefixtures("smollm2", "one_thread")
def test_the_notebook_runs_on_the_real_base() -> None:
    code = cells(real=True)
    assert "Arrr" in printed(code[-1])
    outputs = run(code)
    assert outputs[0] == printed(code[0])
    assert outputs[-1].startswith("None ")


def test_the_notebook_is_light_and_ran_from_its_first_cell_to_its_last() -> None:
    assert NOTEBOOK.stat().st_size < 400_000
    code = [*cells(real=False), *cells(real=True)]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    links = [
        link for cell in notebook["cells"] for pair in LINK.findall("".join(cell["source"])) for link in pair if link
    ]
    assert broken([link for link in links if "/" in link], NOTEBOOK.parent, NOTEBOOK) == []
