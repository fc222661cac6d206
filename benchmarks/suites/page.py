"""The page in Chromium: its first paint, its bytes, and its frames while answers stream.

    python -m benchmarks page [--rounds 7]

It needs what `make test-page` installs.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from typing import Any
from urllib.parse import quote

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import Run, parser
from loradeck.api.page import page_files
from loradeck.base.load import SMOLLM2

COLUMNS, TOKENS = 8, 200
WAIT = 600_000  # milliseconds
FRAME = 1e6 / 60  # microseconds
URL = re.compile(r" on (http://\S+),")
# Counts the frames in the browser's trace: each calls back once.
LOOP = "() => { const next = () => { window.frames_end || requestAnimationFrame(next); }; next(); }"
PAINTED = """() => new Promise((resolve) => new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (entry.name === "first-contentful-paint") resolve(entry.startTime);
}).observe({ type: "paint", buffered: true }))"""

SUITE = Suite(
    "page",
    "The page",
    f"SmolLM2-135M on one of the machine's threads, headless Chromium beside it, {COLUMNS} columns",
    (
        Table(
            "In the browser",
            ("{column}", "{row}"),
            (
                Figure("first paint (ms)", "to the first paint, nothing cached", target="≤ 300"),
                Figure("view (ms)", "to the view Compare, ready"),
                Figure("sent (kB)", "all files, as they are sent", target="≤ 150"),
                Figure("source (kB)", "all files, uncompressed"),
            ),
        ),
        Table(
            f"While {COLUMNS} columns stream",
            ("{column}", "{row}"),
            (
                Figure("frames per second", "frames per second", target="≥ 59"),
                Figure("late frames (%)", "frames that came more than half a frame late"),
                Figure("tokens per second", "tokens per second, all columns"),
            ),
        ),
    ),
    f"""
- *first paint*, *view*: median of loads in new browser contexts on the loopback.
- *frames*: those in Chromium's own trace while {COLUMNS} answers of up to {TOKENS} tokens are drawn as they come. A
  screen has 60 a second; headless Chromium draws without a GPU.
""",
)


def main(arguments: Sequence[str]) -> None:
    run = Run(SUITE, parser(SUITE, __doc__, rounds=7), arguments)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None or find_spec("playwright") is None:
        sys.exit("benchmarks: needs Chromium and Playwright; nothing was measured. Install them: make test-page")
    from playwright.sync_api import sync_playwright

    with serving() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        run.add("load", {**loads(browser, url, run.options.rounds), **sizes()})
        run.add("stream", stream(browser, url))
        version = browser.version
        browser.close()
    run.end({"Chromium": version})


@contextmanager
def serving() -> Iterator[str]:
    """Serve on one thread, so that the browser has a core too; yield the URL."""
    with tempfile.TemporaryDirectory() as adapters:
        command = [sys.executable, "-m", "loradeck", "serve", str(SMOLLM2), "--adapters", adapters, "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            try:
                match = URL.search(process.stdout.readline())
                if match is None:
                    sys.exit("benchmarks: the server did not start; nothing was measured.")
                yield match[1]
            finally:
                process.kill()


def loads(browser: Any, url: str, rounds: int) -> dict[str, float]:
    paints: list[float] = []
    views: list[float] = []
    for _ in range(rounds + 1):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        paints.append(page.evaluate(PAINTED))
        page.get_by_role("button", name="Ask all").wait_for(timeout=WAIT)
        views.append(page.evaluate("performance.now()"))
        context.close()
    return {"first paint (ms)": statistics.median(paints[1:]), "view (ms)": statistics.median(views[1:])}


def sizes() -> dict[str, float]:
    files = page_files().values()
    return {
        "sent (kB)": sum(len(file.compressed) for file in files) / 1e3,
        "source (kB)": sum(len(file.content) for file in files) / 1e3,
    }


def stream(browser: Any, url: str) -> dict[str, float]:
    """Let all columns answer, and return what Chromium's trace says of the frames in between."""
    state = {
        "prompt": "Tell a long story about the sea, with a list of its five ships.",
        "columns": [{"model": ""}] * COLUMNS,
        "sampling": {"temperature": 0, "max_tokens": TOKENS},
    }
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(WAIT)
    page.goto(f"{url}/#compare={quote(json.dumps(state))}")
    page.get_by_role("button", name="Ask all").click()
    page.get_by_text("All columns have answered.").wait_for()  # the first time packs and compiles
    browser.start_tracing(page=page, categories=["devtools.timeline"])
    page.evaluate(LOOP)
    begin = page.evaluate("performance.now()")
    page.get_by_role("button", name="Ask all").click()
    page.get_by_text("The columns answer…").wait_for()
    page.get_by_text("All columns have answered.").wait_for()
    seconds = (page.evaluate("{ window.frames_end = true; performance.now() }") - begin) / 1e3
    events = json.loads(browser.stop_tracing())["traceEvents"]
    times = sorted(event["ts"] for event in events if event["name"] == "FireAnimationFrame")
    frames = [time for index, time in enumerate(times) if not index or time - times[index - 1] > FRAME / 4]
    late = sum(after - before > 1.5 * FRAME for before, after in pairwise(frames))
    page.close()
    return {
        "frames per second": 1e6 * (len(frames) - 1) / (frames[-1] - frames[0]),
        "late frames (%)": 100 * late / len(frames),
        "tokens per second": COLUMNS * TOKENS / seconds,
    }
