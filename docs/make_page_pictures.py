"""Take docs/pictures/page-*.png: the page in Chromium, with SmolLM2 and the adapters of the demo (`make pictures`)."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
ADAPTERS = ROOT / "adapters"
BASE = "smollm2-135m"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 600_000  # milliseconds
COMPARE = {
    "prompt": "Where does rain come from?",
    "columns": [
        {"model": ""},
        {"model": "pirate"},
        {"blend": {"pirate": 0.7, "json": 0.3}},
        {"model": "json"},
    ],
    "sampling": {"temperature": 0, "max_tokens": 48},
}


def main() -> None:
    """Take all pictures."""
    if not (ADAPTERS / "pirate").is_dir():
        sys.exit("docs/make_page_pictures.py: there are no adapters of the demo; run `make demo` first.")
    command = [sys.executable, "-m", "loradeck", "studio", BASE, "--adapters", str(ADAPTERS), "--no-browser"]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            match = re.search(r" on (http://\S+),", process.stdout.readline())
            if match is None:
                sys.exit("docs/make_page_pictures.py: the server did not start.")
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM)
                for scheme in ("light", "dark"):
                    take(browser, match[1], scheme)
                browser.close()
        finally:
            process.terminate()


def take(browser: Any, url: str, scheme: str) -> None:
    """Take the pictures in one colour scheme."""
    page = browser.new_page(viewport={"width": 1280, "height": 720}, color_scheme=scheme)
    page.set_default_timeout(WAIT)

    def picture(name: str) -> None:
        page.screenshot(path=PICTURES / f"page-{name}-{scheme}.png")

    page.goto(f"{url}/#compare={quote(json.dumps(COMPARE))}")
    page.get_by_role("button", name="Ask all").click()
    page.get_by_text("The columns answer…").wait_for()
    page.get_by_text("All columns have answered.").wait_for()
    picture("compare")
    page.get_by_label("Show").select_option("Tokens against the base")
    page.get_by_text("far more likely", exact=True).wait_for()
    picture("tokens")
    page.close()


if __name__ == "__main__":
    main()
