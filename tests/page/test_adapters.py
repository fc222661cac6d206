"""The view of adapters: the table, upload, versions, removal, comparison and blends, as a person does them."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.page.conftest import TIMEOUT, PageServer
from tests.tiny_models import adapter, tiny_base
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from loradeck import AdapterStore

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Request, Route

MANY = 10_000
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
KEY, GUEST = "secret", "guest"
UNDO_SECONDS = 10


@pytest.fixture(scope="module")
def model(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_base("llama", tiny_tokenizer).model


@pytest.fixture(scope="module")
def keyed_server(make_server: Callable[..., PageServer], tmp_path_factory: pytest.TempPathFactory) -> PageServer:
    """A server with a key that may do everything, and a guest's without control, who may use poet and pirate."""
    sha256 = {key: hashlib.sha256(key.encode()).hexdigest() for key in (KEY, GUEST)}
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(
        f'[admin]\nsha256 = "{sha256[KEY]}"\ncontrol = true\ncreate = ["mine-*"]\n'
        f'[guest]\nsha256 = "{sha256[GUEST]}"\nadapters = ["poet", "pirate"]\n'
    )
    return make_server("--keys", str(file))


@pytest.fixture
def view(page: "Page", server: PageServer) -> "Page":
    """The page on its view of adapters."""
    page.goto(f"{server.url}/#adapters")
    row(page, "poet").wait_for()
    return page


def row(page: "Page", name: str) -> "Locator":
    """The row of an adapter."""
    return page.get_by_role("row").filter(has=page.get_by_role("button", name=name, exact=True))


def details(page: "Page", name: str) -> "Locator":
    """The details of an adapter, which are opened."""
    page.get_by_role("button", name=name, exact=True).click()
    panel = page.get_by_role("region", name=name, exact=True)
    panel.wait_for()
    return panel


def version_row(panel: "Locator", spec: str) -> "Locator":
    return panel.get_by_role("row").filter(has=panel.page.get_by_label(f"Compare: {spec}", exact=True))


def names(page: "Page") -> list[str]:
    """The names in the table's rows that are in the document, from top to bottom."""
    return page.locator(".adapter-rows .adapter-name").all_inner_texts()


def answer(server: PageServer, model: str) -> str:
    """What a model says."""
    body = {"model": model, "prompt": "the rain in", "max_tokens": 8, "temperature": 0}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


# ---- the table


def test_the_table_tells_what_the_store_has(view: "Page", server: PageServer) -> None:
    cells = row(view, "poet").get_by_role("cell").all_inner_texts()
    latest = server.store.find("poet")
    assert cells[1:4] == ["poet", "2", "3"]
    assert cells[5] == ", ".join(latest.facts.targets)
    assert cells[6] == "On disk"
    assert view.get_by_role("status").filter(has_text="3 adapters").count() == 1


def test_search_and_order_are_in_the_address(view: "Page") -> None:
    view.get_by_role("button", name="Rank").click()
    assert names(view) == ["poet", "pirate", "team-a"]  # ranks 3, 4 and 5
    view.get_by_role("button", name="Rank").click()
    assert names(view) == ["team-a", "pirate", "poet"]
    assert view.get_by_role("columnheader", name="Rank").get_attribute("aria-sort") == "descending"
    view.get_by_label("Search").fill("poe")
    view.get_by_text("1 of 3 adapters").wait_for()
    view.reload()
    row(view, "poet").wait_for()
    assert names(view) == ["poet"]
    assert view.get_by_label("Search").input_value() == "poe"
    view.get_by_label("Search").fill("disk q_proj")
    row(view, "pirate").wait_for()
    assert names(view) == ["team-a", "pirate", "poet"]


def cards(server: PageServer, ids: list[str]) -> dict[str, Any]:
    """The answer of GET /v1/models with these adapters instead of the store's, all like poet."""
    models = httpx.get(f"{server.url}/v1/models", timeout=TIMEOUT).json()
    poet = next(card for card in models["data"] if card["id"] == "poet")
    return models | {"data": [models["data"][0], *({**poet, "id": each, "root": f"{each}@1"} for each in ids)]}


def fulfil(page: "Page", path: str, body: Any) -> None:
    text = json.dumps(body)

    def answer(route: "Route") -> None:
        route.fulfill(body=text, content_type="application/json")

    page.route(f"**{path}", answer)


def test_ten_thousand_adapters_are_a_few_rows(page: "Page", server: PageServer) -> None:
    """The server's answer is made up: a real store of this size takes longer to write than the test should."""
    fulfil(page, "/v1/models", cards(server, [f"adapter-{number:05}" for number in range(MANY)]))
    page.goto(f"{server.url}/#adapters")
    row(page, "adapter-00000").wait_for()
    page.get_by_text("10,000 adapters").wait_for()
    assert page.get_by_role("table", name="Adapters").get_attribute("aria-rowcount") == str(MANY + 1)
    rows = page.locator(".adapter-rows > *")
    assert rows.count() < 60
    page.locator(".adapter-table").evaluate("table => table.scrollTop = 5000 * 36")
    row(page, "adapter-05003").wait_for()
    assert rows.count() < 60
    assert row(page, "adapter-05003").get_attribute("aria-rowindex") == "5005"
    assert page.locator(".adapter-name[tabindex='0']").all_inner_texts() == ["adapter-05000"]  # for the Tab key
    page.get_by_role("button", name="adapter-05003").focus()
    page.locator(".adapter-table").evaluate("table => table.scrollTop = 0")
    row(page, "adapter-00000").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "adapter-05003"  # what has the focus stays
    page.keyboard.press("End")
    row(page, f"adapter-{MANY - 1:05}").wait_for()
    assert page.evaluate("document.activeElement.textContent") == f"adapter-{MANY - 1:05}"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.textContent") == f"adapter-{MANY - 2:05}"
    assert rows.count() < 60
    page.get_by_label("Search").fill("09998")
    page.get_by_text("1 of 10,000 adapters").wait_for()
    assert names(page) == ["adapter-09998"]


def test_rows_stay_few_while_ten_thousand_are_scrolled(page: "Page", server: PageServer) -> None:
    fulfil(page, "/v1/models", cards(server, [f"adapter-{number:05}" for number in range(MANY)]))
    page.goto(f"{server.url}/#adapters")
    row(page, "adapter-00000").wait_for()
    most = page.evaluate(
        """async () => {
          const table = document.querySelector(".adapter-table");
          const rows = document.querySelector(".adapter-rows");
          let most = 0;
          for (let step = 1; step <= 60; step += 1) {
            table.scrollTop = step * 200;
            await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
            most = Math.max(most, rows.childElementCount);
          }
          return most;
        }"""
    )
    assert most < 60


def test_names_are_text(page: "Page", server: PageServer) -> None:
    """No store holds such a name, but a page must not trust a server with its keys."""
    body = cards(server, [HOSTILE])
    body["data"][1]["adapter"]["targets"] = [HOSTILE]
    fulfil(page, "/v1/models", body)
    page.goto(f"{server.url}/#adapters")
    panel = details(page, HOSTILE)
    panel.get_by_role("alert").wait_for()  # the server has no versions of it
    page.get_by_label(f"Choose {HOSTILE}").check()
    page.get_by_text("1 chosen:").wait_for()
    assert HOSTILE in panel.inner_text()
    assert page.locator("main img, main script").count() == 0
    assert "loradeck" in page.title()


# ---- upload


def upload(page: "Page", choice: str, path: Path) -> "Locator":
    """Open the form, and choose a folder or files."""
    page.get_by_role("button", name="Upload…").click()
    panel = page.get_by_role("region", name="Upload an adapter")
    panel.get_by_label(choice).set_input_files(path)
    return panel


def test_a_folder_is_uploaded(view: "Page", server: PageServer, model: PreTrainedModel, tmp_path: Path) -> None:
    folder = adapter(model, 11, r=4).save(tmp_path / "sailor")
    panel = upload(view, "Choose a folder…", folder)
    assert panel.get_by_label("Name").input_value() == "sailor"
    panel.get_by_role("button", name="Upload").click()
    view.get_by_text("sailor@1 was published.").wait_for()
    view.get_by_role("region", name="sailor", exact=True).wait_for()
    assert row(view, "sailor").get_by_role("cell").nth(2).inner_text() == "1"
    assert server.store.find("sailor").sha256() == sha256_of(folder, tmp_path)
    assert answer(server, "sailor") != answer(server, "tiny")


def sha256_of(folder: Path, tmp_path: Path) -> str:
    """The content hash of an adapter, as a store has it."""
    return AdapterStore(tmp_path / "other").publish("same", folder).sha256()


def test_a_zip_is_uploaded_as_the_next_version(
    view: "Page", server: PageServer, model: PreTrainedModel, tmp_path: Path
) -> None:
    server.store.publish("cook", adapter(model, 12, r=2))
    folder = adapter(model, 13, r=4).save(tmp_path / "files")
    archive = Path(shutil.make_archive(str(tmp_path / "cook"), "zip", folder))
    row(view, "cook").wait_for()  # the page looks at the store from time to time
    panel = upload(view, "Choose files…", archive)
    assert panel.get_by_label("Name").input_value() == "cook"
    panel.get_by_text("It becomes version 2 of cook.").wait_for()
    panel.get_by_role("button", name="Upload").click()
    view.get_by_text("cook@2 was published.").wait_for()
    assert server.store.find("cook").sha256() == sha256_of(folder, tmp_path)
    panel = upload(view, "Choose files…", archive)  # the same once more
    panel.get_by_role("button", name="Upload").click()
    view.get_by_text("cook@2 has this content already: nothing new was published.").wait_for()
    assert server.store.versions("cook") == [1, 2]


def test_a_refusal_is_shown_line_by_line(view: "Page", server: PageServer, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    folder = adapter(LlamaForCausalLM(config), 0, r=2).save(tmp_path / "stranger")
    panel = upload(view, "Choose a folder…", folder)
    panel.get_by_role("button", name="Upload").click()
    panel.get_by_role("alert").wait_for()
    lines = panel.get_by_role("alert").get_by_role("listitem").all_inner_texts()
    assert len(lines) > 1
    assert any("q_proj" in line for line in lines)
    assert "stranger" not in server.store.names()
    assert panel.get_by_role("button", name="Upload").is_enabled()


def test_a_name_that_cannot_be_is_not_sent(view: "Page", model: PreTrainedModel, tmp_path: Path) -> None:
    panel = upload(view, "Choose a folder…", adapter(model, 1, r=2).save(tmp_path / "fine"))
    panel.get_by_label("Name").fill("a/b")
    panel.get_by_text("A name has letters").wait_for()
    panel.get_by_role("button", name="Upload").click()
    assert panel.get_by_label("Name").evaluate("input => input.validity.customError")
    assert panel.get_by_role("progressbar").count() == 0


# ---- loading, versions, removal


def test_details_by_keyboard(view: "Page") -> None:
    focused = "document.activeElement.textContent"
    view.get_by_role("button", name="pirate", exact=True).focus()
    view.keyboard.press("ArrowDown")
    assert view.evaluate(focused) == "poet"
    view.keyboard.press("Enter")
    panel = view.get_by_role("region", name="poet", exact=True)
    panel.wait_for()
    assert view.evaluate(focused) == "poet"  # now the panel's heading
    assert view.evaluate("document.activeElement.tagName") == "H2"
    panel.get_by_role("button", name="Load", exact=True).focus()
    view.keyboard.press("Enter")
    panel.get_by_role("button", name="Unload").wait_for()
    assert panel.evaluate("panel => panel.contains(document.activeElement)")  # although its button is gone
    view.keyboard.press("Escape")
    panel.wait_for(state="detached")
    assert view.evaluate(focused) == "poet"
    assert view.evaluate("document.activeElement.tagName") == "BUTTON"


def test_loading_and_unloading(view: "Page") -> None:
    panel = details(view, "pirate")
    panel.get_by_role("button", name="Load", exact=True).click()
    panel.get_by_role("button", name="Unload").wait_for()
    assert "On the device" in row(view, "pirate").inner_text()
    panel.get_by_role("button", name="Unload").click()
    panel.get_by_role("button", name="Load", exact=True).wait_for()
    assert "On disk" in row(view, "pirate").inner_text()


def test_an_older_version_is_published_again(page: "Page", server: PageServer, model: PreTrainedModel) -> None:
    for seed in (21, 22):
        server.store.publish("again", adapter(model, seed, r=2))
    page.goto(f"{server.url}/#adapters")
    panel = details(page, "again")
    version_row(panel, "again@2").wait_for()
    assert version_row(panel, "again@2").get_by_role("button", name="Publish again").count() == 0
    version_row(panel, "again@1").get_by_role("button", name="Publish again").click()
    version_row(panel, "again@3").wait_for()
    assert server.store.find("again@3").sha256() == server.store.find("again@1").sha256()
    assert panel.page.get_by_label("Compare: again@1", exact=True).get_attribute("href") == (
        "#compare=%7B%22columns%22%3A%5B%7B%22model%22%3A%22tiny%22%7D%2C%7B%22model%22%3A%22again%401%22%7D%5D%7D"
    )


@pytest.fixture
def deletions(page: "Page") -> "list[Request]":
    """The requests to remove something."""
    requests: list[Request] = []
    page.on("request", lambda request: requests.append(request) if request.method == "DELETE" else None)
    return requests


def test_removal_can_be_undone(
    page: "Page", server: PageServer, model: PreTrainedModel, deletions: "list[Request]"
) -> None:
    server.store.publish("brief", adapter(model, 31, r=2))
    page.clock.install()
    page.goto(f"{server.url}/#adapters")
    panel = details(page, "brief")
    panel.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_text("brief will be removed.").wait_for()
    assert "removed" in (row(page, "brief").get_attribute("class") or "")
    assert "Being removed" in row(page, "brief").inner_text()
    page.clock.run_for((UNDO_SECONDS - 1) * 1000)
    page.get_by_role("button", name="Undo").click()
    page.clock.run_for(2 * UNDO_SECONDS * 1000)
    assert "Being removed" not in row(page, "brief").inner_text()
    assert not deletions
    panel.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_text("brief will be removed.").wait_for()
    page.clock.run_for((UNDO_SECONDS + 1) * 1000)
    row(page, "brief").wait_for(state="detached")
    assert [request.url for request in deletions] == [f"{server.url}/v1/models/brief"]
    assert "brief" not in server.store.names()


def test_one_version_is_removed(page: "Page", server: PageServer, model: PreTrainedModel) -> None:
    for seed in (32, 33):
        server.store.publish("twice", adapter(model, seed, r=2))
    page.clock.install()
    page.goto(f"{server.url}/#adapters")
    panel = details(page, "twice")
    version_row(panel, "twice@1").get_by_role("button", name="Remove").click()
    page.get_by_text("twice@1 will be removed.").wait_for()
    assert "Being removed" in version_row(panel, "twice@1").inner_text()
    assert "Being removed" not in row(page, "twice").inner_text()
    page.clock.run_for((UNDO_SECONDS + 1) * 1000)
    version_row(panel, "twice@1").wait_for(state="detached")
    assert server.store.versions("twice") == [2]


def test_leaving_the_page_removes_nothing(
    page: "Page", server: PageServer, model: PreTrainedModel, deletions: "list[Request]"
) -> None:
    server.store.publish("stays", adapter(model, 34, r=2))
    page.clock.install()
    page.goto(f"{server.url}/#adapters")
    details(page, "stays").get_by_role("button", name="Remove", exact=True).click()
    page.get_by_text("stays will be removed.").wait_for()
    page.reload()
    page.clock.run_for(2 * UNDO_SECONDS * 1000)
    row(page, "stays").wait_for()
    assert not deletions
    assert "stays" in server.store.names()


# ---- comparison and blends


def test_two_adapters_are_compared(view: "Page") -> None:
    view.get_by_label("Choose poet").check()
    view.get_by_label("Choose pirate").check()
    view.get_by_role("button", name="Compare weights").click()
    panel = view.get_by_role("region", name="Two adapters compared")
    panel.get_by_text("Distance of all together").wait_for()
    kinds = 7  # the linear modules of a Llama's layer
    assert panel.locator(".heat-positive, .heat-negative").count() == 2 * kinds
    panel.get_by_role("img").focus()
    readout = panel.locator("output")
    assert re.match(
        r"model\.layers\.0\.\S+: norm A \S+, norm B \S+, distance \S+, similarity \S+", readout.inner_text()
    )
    view.keyboard.press("ArrowRight")
    assert readout.inner_text().startswith("model.layers.1.")
    panel.get_by_label("Colour").select_option("norm_a")
    assert panel.locator(".heat-positive").count() == 2 * kinds
    panel.get_by_text("As a table").click()
    assert panel.get_by_role("rowheader").count() == 2 * kinds


def test_an_adapter_that_is_none_cannot_be_compared(view: "Page") -> None:
    view.get_by_label("Choose poet").check()
    view.get_by_label("Choose pirate").check()
    view.get_by_role("button", name="Compare weights").click()
    panel = view.get_by_role("region", name="Two adapters compared")
    panel.get_by_label("B", exact=True).fill("nobody")
    panel.get_by_role("button", name="Compare weights").click()
    assert "nobody" in panel.get_by_role("alert").inner_text()


def test_a_blend_is_saved_and_answers(view: "Page", server: PageServer) -> None:
    view.get_by_label("Choose poet").check()
    view.get_by_label("Choose pirate").check()
    view.get_by_role("button", name="Blend…").click()
    panel = view.get_by_role("region", name="Save a blend")
    panel.get_by_label("Weight of pirate", exact=True).fill("0.75")
    panel.get_by_label("Weight of poet, as a number").fill("0.25")
    panel.get_by_label("Name of the blend").fill("mix")
    assert "%22poet%22%3A0.25%2C%22pirate%22%3A0.75" in str(
        panel.get_by_role("link", name="Try it in Compare").get_attribute("href")
    )
    panel.get_by_role("button", name="Save the blend").click()
    view.get_by_text("mix@1 was published.").wait_for()
    assert server.store.find("mix").facts.r == 3 + 4
    assert answer(server, "mix") == answer(server, "poet*0.25+pirate*0.75") != answer(server, "tiny")


def test_a_blend_that_is_refused_says_why(view: "Page") -> None:
    view.get_by_label("Choose poet").check()
    view.get_by_label("Choose pirate").check()
    view.get_by_role("button", name="Blend…").click()
    panel = view.get_by_role("region", name="Save a blend")
    panel.get_by_label("Another adapter").fill("nobody")
    panel.get_by_role("button", name="Add").click()
    panel.get_by_label("Name of the blend").fill("strange")
    panel.get_by_role("button", name="Save the blend").click()
    assert "nobody" in panel.get_by_role("alert").inner_text()


# ---- keys


@pytest.fixture
def sign_in(page: "Page", keyed_server: PageServer) -> Callable[[str], "Page"]:
    """Return a function that opens the view of adapters with a key."""

    def sign_in(key: str) -> "Page":
        page.add_init_script(f"sessionStorage.setItem('loradeck.key', {key!r})")
        page.goto(f"{keyed_server.url}/#adapters")
        row(page, "poet").wait_for()
        return page

    return sign_in


def test_a_key_without_control_is_offered_only_looking(sign_in: Callable[[str], "Page"]) -> None:
    page = sign_in(GUEST)
    assert names(page) == ["pirate", "poet"]  # team-a is not the guest's
    panel = details(page, "poet")
    version_row(panel, "poet@1").wait_for()
    page.get_by_label("Choose poet").check()
    page.get_by_label("Choose pirate").check()
    page.get_by_role("button", name="Compare weights", exact=True).wait_for()
    for name in ("Upload…", "Load", "Unload", "Remove", "Publish again", "Blend…", "Requests"):
        assert page.get_by_role("button", name=name).count() == 0, name
    page.get_by_role("button", name="Compare weights", exact=True).click()
    page.get_by_text("Distance of all together").wait_for()


def test_a_key_changes_what_it_may_create(
    sign_in: Callable[[str], "Page"], model: PreTrainedModel, tmp_path: Path
) -> None:
    page = sign_in(KEY)
    panel = upload(page, "Choose a folder…", adapter(model, 1, r=2).save(tmp_path / "theirs"))
    panel.get_by_text("This API key may create: mine-*.").wait_for()
    panel.get_by_label("Name").fill("mine-own")
    panel.get_by_role("button", name="Upload").click()
    page.get_by_text("mine-own@1 was published.").wait_for()
    page.get_by_role("region", name="mine-own").get_by_role("button", name="Remove", exact=True).wait_for()
    panel = details(page, "poet")
    version_row(panel, "poet@1").wait_for()
    panel.get_by_role("button", name="Load", exact=True).wait_for()
    assert panel.get_by_role("button", name="Remove").count() == 0  # nor may it remove what it may not create
    assert panel.get_by_role("button", name="Publish again").count() == 0


def test_patterns_are_those_of_the_keys_file(page: "Page", server: PageServer) -> None:
    page.goto(server.url)
    matches = page.evaluate(
        """async () => {
          const { matches } = await import("/page/pattern.js");
          const cases = [["team-a", "team-*"], ["team", "team-*"], ["a.b", "a?b"], ["ab", "[!a]b"], ["cb", "[!a]b"],
            ["a+b", "a+b"], ["aab", "a+b"], ["x", "[a-y]"], ["]", "[]]"], ["\\u{1f600}", "?"]];
          return cases.map(([name, pattern]) => matches(name, [pattern]));
        }"""
    )
    assert matches == [True, False, True, False, True, True, False, True, True, True]
