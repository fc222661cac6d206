"""Write docs/cli.md from the command line's own help: `python docs/make_cli.py`. A test finds it out of date."""

from pathlib import Path

from loradeck.cli import app

PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    """Return the page as it should be."""
    return "<!-- Written by docs/make_cli.py; do not edit. -->\n\n" + app.generate_docs("markdown").strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
