"""The page itself: its parts arrive, and it says whether the server answers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from tests.page.conftest import PageServer


def test_it_opens_and_names_the_base(page: "Page", server: "PageServer") -> None:
    page.goto(server.url)
    page.get_by_role("status").get_by_text("tiny").wait_for()
    assert page.get_by_role("link", name="Compare").get_attribute("aria-current") == "page"
