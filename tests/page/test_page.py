"""The page as a whole: keys and their rights, a server that is gone, the keyboard, small windows, accessibility."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page
    from tests.page.conftest import PageServer

VIEWS = ("Compare", "Adapters", "Train", "Server")
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
KEYS = {
    "root": "control = true\ntrain = true\n",
    "reader": 'adapters = ["poet"]\n',
    "trainer": 'train = true\ncreate = ["mine-*"]\n',
}


def status(page: "Page") -> Any:
    return page.locator("#server")


def views(page: "Page") -> list[str]:
    return page.locator("nav a").all_inner_texts()


def test_it_opens_with_the_first_view(page: "Page", server: "PageServer") -> None:
    page.goto(server.url)
    status(page).get_by_text("tiny").wait_for()
    page.get_by_role("link", name="Compare").and_(page.locator("[aria-current=page]")).wait_for()
    page.locator("main").get_by_role("heading").first.wait_for()
    assert views(page) == [*VIEWS]
    assert "tiny" in page.title()


def test_every_view_opens_by_keyboard(page: "Page", server: "PageServer") -> None:
    page.goto(server.url)
    for view in VIEWS:
        page.get_by_role("link", name=view, exact=True).focus()
        page.keyboard.press("Enter")
        page.locator(f"nav a[aria-current=page]:text-is('{view}')").wait_for()
        page.locator("main").get_by_role("heading").first.wait_for()


def test_an_address_of_no_view_shows_the_first(page: "Page", server: "PageServer") -> None:
    page.goto(f"{server.url}/#nothing=%7B")
    page.locator("nav a[aria-current=page]:text-is('Compare')").wait_for()
    page.goto(f"{server.url}/#server=%7Bcut")
    page.locator("nav a[aria-current=page]:text-is('Server')").wait_for()
    page.get_by_text("The link is damaged").wait_for()


# ---- keys


@pytest.fixture(scope="module")
def keyed(make_server: "Callable[..., PageServer]", tmp_path_factory: pytest.TempPathFactory) -> "PageServer":
    """A server with the keys of KEYS; each key is its name."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    tables = [f'[{name}]\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n{may}' for name, may in KEYS.items()]
    keys.write_text("\n".join(tables))
    return make_server("--keys", str(keys))


def give_key(page: "Page", key: str) -> None:
    page.get_by_label("API key of this server").fill(key)
    page.get_by_role("button", name="Use it").click()


def test_a_key_is_asked_for_until_it_is_right(page: "Page", keyed: "PageServer") -> None:
    page.goto(keyed.url)
    give_key(page, "wrong")
    page.get_by_text("Invalid API key.").first.wait_for()
    give_key(page, "root")
    status(page).get_by_text("key root").wait_for()
    page.locator("nav a").first.wait_for()
    assert views(page) == [*VIEWS]
    page.reload()
    status(page).get_by_text("key root").wait_for()
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]


@pytest.mark.parametrize(
    ("key", "offered"), [("reader", ["Compare", "Adapters"]), ("trainer", ["Compare", "Adapters", "Train"])]
)
def test_a_key_is_offered_what_it_may_do(page: "Page", keyed: "PageServer", key: str, offered: list[str]) -> None:
    page.goto(keyed.url)
    give_key(page, key)
    status(page).get_by_text(f"key {key}").wait_for()
    page.locator("nav a").first.wait_for()
    assert views(page) == offered
    page.goto(f"{keyed.url}/#server")
    page.locator("nav a[aria-current=page]:text-is('Compare')").wait_for()


def test_the_key_can_be_changed(page: "Page", keyed: "PageServer") -> None:
    page.goto(keyed.url)
    give_key(page, "root")
    status(page).get_by_text("key root").wait_for()
    page.get_by_role("button", name="API key").click()
    give_key(page, "reader")
    status(page).get_by_text("key reader").wait_for()


def test_no_answer_to_the_question_asks_again_later(page: "Page", keyed: "PageServer") -> None:
    page.goto(keyed.url)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").wait_for(state="detached")
    page.reload()
    page.get_by_label("API key of this server").wait_for()


# ---- a server that is gone


def test_a_server_that_is_gone_is_said_and_comes_back(page: "Page", make_server: "Callable[..., PageServer]") -> None:
    server = make_server()
    page.goto(server.url)
    status(page).get_by_text("tiny").wait_for()
    server.kill()
    status(page).get_by_text("does not answer").wait_for()
    server.start()
    status(page).get_by_text(re.compile("^tiny")).wait_for()
    page.get_by_role("link", name="Adapters").click()
    page.get_by_text("pirate").first.wait_for()


# ---- everybody


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest, context: "BrowserContext", page: "Page") -> str:
    page.emulate_media(color_scheme=request.param)
    return request.param


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(page: "Page", server: "PageServer", scheme: str, view: str) -> None:
    if not AXE.is_file():
        pytest.skip("needs axe-core, which make test installs where npm is")
    page.goto(f"{server.url}/#{view.lower()}")
    page.locator(f"nav a[aria-current=page]:text-is('{view}')").wait_for()
    page.locator("main").get_by_role("heading").first.wait_for()
    page.evaluate(AXE.read_text())
    violations = page.evaluate("tags => axe.run(document, {runOnly: tags})", WCAG)["violations"]
    serious = [violation for violation in violations if violation["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(serious, indent=1)[:4000]


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_does_not_scroll_sideways(browser: "Browser", server: "PageServer", view: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True)
    page = context.new_page()
    page.goto(f"{server.url}/#{view.lower()}")
    page.locator("main").get_by_role("heading").first.wait_for()
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    context.close()
    assert widths[0] <= widths[1]
