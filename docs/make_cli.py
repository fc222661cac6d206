"""Write docs/cli.md from the help of the command line: `python docs/make_cli.py`. A test checks that it is current."""

from pathlib import Path

from loradeck.cli import app

PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    """Return the current text of the page."""
    return "<!-- Written by docs/make_cli.py; do not edit. -->\n\n" + app.generate_docs("markdown").strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
