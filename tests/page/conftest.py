"""A real server on a tiny model, in a process of its own, and Chromium, which Playwright drives."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.tiny_models import adapter, tiny_base
from transformers import PreTrainedTokenizerFast

from loradeck import AdapterStore

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 600.0  # seconds; only a deadlock takes as long
URL = re.compile(r" on (http://\S+),")


@dataclass
class PageServer:
    """`loradeck serve`, which can be killed and started again at the same address."""

    base: Path
    store: AdapterStore
    options: tuple[str, ...] = ()
    url: str = ""
    process: "subprocess.Popen[str] | None" = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        port = self.url.rpartition(":")[2] or "0"
        command = [sys.executable, "-m", "loradeck", "serve", str(self.base), "--adapters", str(self.store.folder)]
        command += ["--train", "--port", port, *self.options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (self.store.folder.parent / "log.txt").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = URL.search(line)
        assert match, f"{line!r}, and {log.name}: {Path(log.name).read_text()[-2000:]}"
        self.url = match[1]

    def kill(self) -> None:
        """End it as `kill -9` does."""
        assert self.process is not None
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama as transformers saves it."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    base = tiny_base("llama", tiny_tokenizer)
    base.model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_server(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Callable[..., PageServer]]:
    """Return a function that starts a server with a store of its own: poet in two versions, pirate, and team-a."""
    servers: list[PageServer] = []

    def make(*options: str) -> PageServer:
        store = AdapterStore(tmp_path_factory.mktemp("served") / "store")
        model = tiny_base("llama", tiny_tokenizer).model
        for seed, name in enumerate(("poet", "poet", "pirate", "team-a")):
            store.publish(name, adapter(model, seed, r=2 + seed))
        servers.append(PageServer(base_folder, store, options))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def server(make_server: Callable[..., PageServer]) -> PageServer:
    """A server without keys, which the tests of a file share."""
    return make_server()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Chromium; skips where it or Playwright is missing."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: make test-page")
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make test-page")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: "Browser") -> "Iterator[BrowserContext]":
    """A window of its own, without anything in its storage."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(TIMEOUT * 1000)
    yield context
    context.close()


@pytest.fixture
def page(context: "BrowserContext") -> "Iterator[Page]":
    """A tab. At its end, the page must have logged no error and asked no other host."""
    problems: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if _is_error(message) else None)
    page.on("request", lambda request: problems.append(request.url) if not _is_local(request.url) else None)
    yield page
    assert not problems


def _is_error(message: Any) -> bool:
    """Return whether the console shows an error; that of an HTTP status, or of a server that is gone, is expected."""
    return message.type == "error" and "Failed to load resource" not in message.text


def _is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "blob:", "data:"))
