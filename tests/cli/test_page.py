import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_docs_cli_md_is_the_help() -> None:
    page = runpy.run_path(str(DOCS / "make_cli.py"))["page"]()
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == page, "run: python docs/make_cli.py"
