"""The view Compare: every part of it, done as a person does it, against a real server on the tiny model."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import pytest
from tests.page.conftest import PageServer
from tests.page.relay import TIMEOUT, Exchange, Relay, tokens

from loradeck import AdapterStore

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator, Page

GREEDY = {"temperature": 0, "max_tokens": 24, "seed": 1}
LONG = re.compile(r"finish: (length|stop)")
BLEND = {"columns": [{"blend": {"poet": 1, "pirate": 0.5}}], "prompt": "Ahoy", "sampling": GREEDY}
HOSTILE = (
    "<script>document.title = 'run'</script>\n\n<img src=x onerror=\"document.title = 'run'\"> [a](javascript:alert(1))"
)


def link(url: str, **state: Any) -> str:
    return f"{url}/#compare={quote(json.dumps(state))}"


def models(*names: str, prompt: str = "Tell me", **state: Any) -> dict[str, Any]:
    return {"columns": [{"model": name} for name in names], "prompt": prompt, "sampling": GREEDY, **state}


def column(page: "Page", index: int) -> "Locator":
    return page.locator(".column").nth(index)


def ask(page: "Page") -> None:
    """Ask all columns, and wait for all answers."""
    page.get_by_role("button", name="Ask all").click()
    for index in range(page.locator(".column").count()):
        column(page, index).get_by_text(LONG).wait_for()


def answer(server: PageServer, model: str, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    """Return what the server answers to a client of its API."""
    body = json.dumps({"model": model, "messages": messages, **GREEDY, **fields}).encode()
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return json.loads(response.read())["choices"][0]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def names(choice: dict[str, Any]) -> list[str]:
    return [token["token"] for token in choice["logprobs"]["content"]]


def shown(page: "Page", index: int) -> list[str]:
    """Return the tokens that a column shows."""
    return column(page, index).locator(".tokens span").all_text_contents()


def state(page: "Page") -> dict[str, Any]:
    """Return the state in the address, as it is once it has been written."""
    return json.loads(unquote(page.url.partition("#compare=")[2]))


def until(holds: Callable[[], bool], page: "Page") -> None:
    """Wait until something holds; Playwright's own way needs `eval`, which the page forbids."""
    end = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < end
        page.evaluate("new Promise(requestAnimationFrame)")


def until_state(page: "Page", expected: Callable[[dict[str, Any]], bool]) -> None:
    until(lambda: expected(state(page)), page)


def suggestions(page: "Page") -> list[str]:
    """Return what the focused field suggests."""
    return page.evaluate("[...document.activeElement.list.options].map(option => option.value)")


@pytest.fixture
def relay(server: PageServer) -> Iterator[Callable[[Callable[[Relay, Exchange], None]], Relay]]:
    """Return a function that starts a relay before the server."""
    relays: list[Relay] = []

    def make(answer: Callable[[Relay, Exchange], None]) -> Relay:
        relays.append(Relay(server.url, answer))
        return relays[-1]

    yield make
    for one in relays:
        one.close()


MakeRelay = Callable[[Callable[[Relay, Exchange], None]], Relay]


# ---- asking


def test_columns_show_what_the_api_answers(page: "Page", server: PageServer) -> None:
    page.goto(link(server.url, **models("", "poet", "poet@1", "poet*0.7+pirate*0.3", display="tokens")))
    ask(page)
    for index, model in enumerate(("tiny", "poet", "poet@1", "poet*0.7+pirate*0.3")):
        expected = answer(server, model, [user("Tell me")], logprobs=True)
        assert shown(page, index) == names(expected)
        numbers = column(page, index).locator(".numbers").inner_text()
        assert f"{len(names(expected))} tokens" in numbers
        assert "tokens/s" in numbers
        assert "first after" in numbers
        assert f"finish: {expected['finish_reason']}" in numbers
    page.get_by_text("All columns have answered.").wait_for()


def test_a_column_is_added_chosen_and_removed(page: "Page", server: PageServer) -> None:
    page.goto(link(server.url, **models("poet", display="tokens")))
    page.get_by_role("button", name="Add a column").click()
    page.keyboard.type("pir")
    until(lambda: suggestions(page) == ["pirate"], page)
    page.keyboard.type("ate")
    page.keyboard.press("Enter")
    ask(page)
    assert shown(page, 1) == names(answer(server, "pirate", [user("Tell me")], logprobs=True))
    page.get_by_role("button", name="Remove poet").click()
    assert page.locator(".column").count() == 1
    until_state(page, lambda state: state["columns"] == [{"model": "pirate"}])


def test_all_of_eight_columns_are_asked_at_once(page: "Page", server: PageServer, relay: MakeRelay) -> None:
    all_have_come = threading.Barrier(8)

    def hold(_: Relay, exchange: Exchange) -> None:
        all_have_come.wait(TIMEOUT)
        exchange.begin()
        exchange.send("here", finish="stop")

    page.goto(link(relay(hold).url, **models(*["poet"] * 8)))
    ask(page)
    for index in range(8):
        assert column(page, index).locator(".answer").inner_text() == "here"


def test_stop_keeps_what_has_arrived(page: "Page", relay: MakeRelay) -> None:
    def hold(relay: Relay, exchange: Exchange) -> None:
        exchange.begin()
        exchange.send("It ", "was ")
        if exchange.body["model"] == "pirate":
            relay.released.wait(TIMEOUT)
        exchange.send("night.", finish="stop")

    page.goto(link(relay(hold).url, **models("poet", "pirate")))
    page.get_by_role("button", name="Ask all").click()
    column(page, 0).get_by_text("finish: stop").wait_for()
    column(page, 1).get_by_text("It was").wait_for()
    column(page, 1).get_by_role("button", name="Stop").click()
    column(page, 1).get_by_text("Stopped; what has arrived is kept.").wait_for()
    page.get_by_text("Stopped.", exact=True).wait_for()
    assert column(page, 1).locator(".answer").inner_text().strip() == "It was"
    assert column(page, 0).locator(".answer").inner_text() == "It was night."
    column(page, 0).get_by_role("button", name="Ask again").click()
    column(page, 0).get_by_text("finish: stop").wait_for()
    page.get_by_text("The column has answered.").wait_for()  # the other one was stopped before


def test_an_answer_that_fails_says_so_and_the_page_recovers(page: "Page", relay: MakeRelay) -> None:
    def break_off(relay: Relay, exchange: Exchange) -> None:
        if len(relay.exchanges) > 1:
            exchange.begin()
            exchange.send("whole", finish="stop")
            return
        exchange.handler.send_response(200)
        exchange.handler.send_header("content-length", "100000")  # more than is sent
        exchange.handler.end_headers()
        exchange.send("half")
        relay.released.wait(TIMEOUT)

    broken = relay(break_off)
    page.goto(link(broken.url, **models("poet")))
    page.get_by_role("button", name="Ask all").click()
    column(page, 0).get_by_text("half").wait_for()
    broken.released.set()
    column(page, 0).get_by_text("It failed; what has arrived is kept.").wait_for()
    assert column(page, 0).locator(".answer").inner_text() == "half"
    page.get_by_role("status").get_by_text(re.compile("^tiny")).wait_for()
    ask(page)
    assert column(page, 0).locator(".answer").inner_text() == "whole"


def test_a_server_that_was_killed_and_started_again_answers(
    page: "Page", make_server: Callable[..., PageServer]
) -> None:
    server = make_server()
    page.goto(link(server.url, **models("poet")))
    ask(page)
    server.kill()
    page.get_by_role("button", name="Ask all").click()
    column(page, 0).get_by_text("The server does not answer.").wait_for()
    page.get_by_text("looking for it").wait_for()
    server.start()
    page.get_by_text("looking for it").wait_for(state="detached")
    ask(page)
    assert page.get_by_label("Prompt").input_value() == "Tell me"


def test_an_unknown_model_fails_alone(page: "Page", server: PageServer) -> None:
    page.goto(link(server.url, **models("poet", "poett")))
    page.get_by_role("button", name="Ask all").click()
    column(page, 0).get_by_text(LONG).wait_for()
    column(page, 1).get_by_text("Did you mean poet?").wait_for()
    page.get_by_text("1 of 2 columns failed.").wait_for()


# ---- a conversation


def test_a_conversation_goes_on_and_is_edited(page: "Page", server: PageServer) -> None:
    page.goto(link(server.url, **models("poet", "pirate", prompt="", display="tokens")))
    prompt = page.get_by_label("Prompt")
    page.get_by_text("System text", exact=True).first.click()
    page.get_by_label("System text").fill("Be brief.")
    prompt.fill("One?")
    prompt.press("Enter")
    for index in range(2):
        column(page, index).get_by_text(LONG).wait_for()
    system = {"role": "system", "content": "Be brief."}
    firsts = [answer(server, name, [system, user("One?")])["message"] for name in ("poet", "pirate")]
    page.get_by_role("button", name="Follow up").click()
    assert page.get_by_text("All columns have answered.").count() == 0  # not the next question
    prompt.fill("Two?")
    ask(page)
    for index, name in enumerate(("poet", "pirate")):
        messages = [system, user("One?"), firsts[index], user("Two?")]
        assert shown(page, index) == names(answer(server, name, messages, logprobs=True))
    until_state(page, lambda state: len(state.get("messages", [])) == 2)
    assert state(page)["messages"][1]["content"] == firsts[0]["content"]
    assert state(page)["columns"][1]["answers"] == [firsts[1]["content"]]
    page.get_by_role("button", name="Edit question 1").click()
    assert prompt.input_value() == "One?"
    prompt.fill("Other?")
    ask(page)
    assert shown(page, 1) == names(answer(server, "pirate", [system, user("Other?")], logprobs=True))


def test_a_base_without_a_chat_template_continues_the_prompt(page: "Page", base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in base_folder.iterdir():
        if file.suffix == ".jinja":
            continue
        text = file.read_bytes()
        if file.name == "tokenizer_config.json":
            settings = {name: value for name, value in json.loads(text).items() if name != "chat_template"}
            text = json.dumps(settings).encode()
        (folder / file.name).write_bytes(text)
    (tmp_path / "store").mkdir()
    plain = PageServer(folder, AdapterStore(tmp_path / "store"))
    plain.start()
    try:
        page.goto(link(plain.url, **models("", display="tokens")))
        ask(page)
        column(page, 0).get_by_text("Without a chat template").wait_for()
        assert len(shown(page, 0)) > 0
    finally:
        plain.kill()


# ---- blends


def test_a_slider_moves_a_blend(page: "Page", server: PageServer) -> None:
    page.goto(link(server.url, **BLEND, display="tokens"))
    slider = page.get_by_role("slider", name="Weight of pirate")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    until_state(page, lambda state: state["columns"] == [{"blend": {"poet": 1, "pirate": 0.75}}])
    assert page.get_by_label("Weight of pirate, as a number").input_value() == "0.75"
    ask(page)
    assert shown(page, 0) == names(answer(server, "poet+pirate*0.75", [user("Ahoy")], logprobs=True))
    page.get_by_label("Weight of poet, as a number").fill("0.2")
    page.keyboard.press("Enter")
    column(page, 0).get_by_text("ask again for one of poet*0.2+pirate*0.75").wait_for()
    number = page.get_by_label("Weight of poet, as a number")
    for weight in ("", "2000000"):
        number.fill(weight)
        page.keyboard.press("Enter")
        assert number.input_value() == "0.2"  # which still holds
    page.get_by_role("button", name="Take pirate out of the blend").click()
    page.keyboard.type("team-a")
    page.keyboard.press("Enter")
    until_state(page, lambda state: state["columns"] == [{"blend": {"poet": 0.2, "team-a": 0.5}}])


def test_a_slider_moved_in_an_answer_is_heard_from_the_next_token(page: "Page", relay: MakeRelay) -> None:
    def hold(relay: Relay, exchange: Exchange) -> None:
        exchange.begin()
        if len(relay.exchanges) == 1:
            exchange.send("It ", "was ")
            relay.released.wait(TIMEOUT)
        exchange.send("night.", finish="stop")

    held = relay(hold)
    page.goto(link(held.url, **BLEND, display="tokens"))
    page.get_by_role("button", name="Ask all").click()
    column(page, 0).get_by_text("It was").wait_for()
    page.get_by_role("slider", name="Weight of pirate").focus()
    page.keyboard.press("ArrowLeft")
    column(page, 0).get_by_text("finish: stop").wait_for()
    assert shown(page, 0) == ["It ", "was ", "night."]
    first, second = held.exchanges
    assert first.body["model"] == "poet+pirate*0.5"
    assert second.path == "/v1/completions"
    assert second.body["model"] == "poet+pirate*0.45"
    assert second.body["prompt"] == [1, 2, 3, 3, 4]  # of the prompt, and of the answer so far
    assert second.body["max_tokens"] == GREEDY["max_tokens"] - 2
    assert column(page, 0).locator(".turn").inner_text() == "night."


# ---- tokens


def test_hover_and_focus_show_the_alternatives(page: "Page", server: PageServer) -> None:
    page.goto(link(server.url, **models("poet", display="tokens")))
    ask(page)
    tokens = answer(server, "poet", [user("Tell me")], logprobs=True, top_logprobs=5)["logprobs"]["content"]
    details = column(page, 0).locator(".token-details")
    column(page, 0).locator(".tokens span").nth(2).hover()
    details.get_by_text("rank 1").wait_for()
    assert details.locator("tr").count() == 5
    column(page, 0).locator(".tokens").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    likeliest = [f"{100 * 2.718281828459045 ** one['logprob']:.3g} %" for one in tokens[1]["top_logprobs"]]
    assert details.locator("td.number").first.inner_text() == likeliest[0]
    page.keyboard.press("Escape")
    details.wait_for(state="hidden")


def test_colours_by_probability(page: "Page", server: PageServer) -> None:
    page.goto(link(server.url, **models("poet")))
    ask(page)
    page.get_by_label("Show").select_option("Tokens by probability")
    probabilities = [
        2.718281828459045 ** token["logprob"]
        for token in answer(server, "poet", [user("Tell me")], logprobs=True)["logprobs"]["content"]
    ]
    expected = [sum(one >= bound for bound in (0.05, 0.25, 0.5, 0.8)) for one in probabilities]
    classes = column(page, 0).locator(".tokens span").evaluate_all("spans => spans.map(span => span.className)")
    assert classes == [f"probability-{level}" for level in expected]
    until_state(page, lambda state: state.get("colour") == "probability")
    page.get_by_text("≥ 80 %").wait_for()


def test_colours_against_the_base(page: "Page", server: PageServer) -> None:
    page.goto(link(server.url, **models("", "poet", colour="difference")))
    ask(page)
    column(page, 1).locator(".tokens [class*=difference]").first.wait_for()
    column(page, 0).locator(".tokens .difference-2").first.wait_for()
    count = column(page, 0).locator(".tokens span").count()
    assert column(page, 0).locator(".tokens .difference-2").count() == count, "the base differs from itself"
    assert column(page, 1).locator(".tokens [class*=difference]").count() == len(shown(page, 1))
    column(page, 1).locator(".tokens span").first.hover()
    column(page, 1).get_by_text(re.compile(r"against the base: [+−][\d.e-]+ \(base")).wait_for()


def test_the_base_may_refuse_to_compare(page: "Page", relay: MakeRelay) -> None:
    def refuse(relay: Relay, exchange: Exchange) -> None:
        if exchange.body.get("echo"):
            relay.forward(exchange.handler, json.dumps({**exchange.body, "prompt": [100_000]}).encode())
            return
        exchange.begin()
        exchange.send("night", finish="stop")

    page.goto(link(relay(refuse).url, **models("poet", colour="difference")))
    ask(page)
    column(page, 0).get_by_text("Against the base: –").wait_for()
    column(page, 0).locator(".tokens span").hover()
    column(page, 0).get_by_text("against the base: –", exact=False).last.wait_for()


def test_where_answers_part_is_marked(page: "Page", relay: MakeRelay) -> None:
    texts = {"poet": "The sea is **blue**.", "pirate": "The sea is **wide**.", "team-a": "The sea is **blue**."}

    def speak(_: Relay, exchange: Exchange) -> None:
        exchange.begin()
        exchange.send(*tokens(texts[exchange.body["model"]]), finish="stop")

    page.goto(link(relay(speak).url, **models("poet", "pirate", "team-a")))
    ask(page)
    column(page, 1).get_by_text("parts from poet at token 4").wait_for()
    column(page, 2).get_by_text("same as poet").wait_for()
    assert column(page, 1).locator(".answer strong").evaluate("strong => strong.firstChild.className") == "parting"
    assert column(page, 0).locator(".parting").count() == 0
    page.get_by_label("Show").select_option("Tokens")
    assert column(page, 1).locator(".parts").inner_text() == "*wid"
    column(page, 1).get_by_role("button", name="Pin").click()  # now the others are compared with this one
    column(page, 1).get_by_text("parts from pirate").wait_for()
    assert column(page, 0).get_attribute("aria-label") == "pirate"
    until_state(page, lambda state: state["columns"][0] == {"model": "pirate", "pinned": True})


# ---- what others wrote


def test_html_of_an_answer_is_text(page: "Page", relay: MakeRelay) -> None:
    def speak(_: Relay, exchange: Exchange) -> None:
        exchange.begin()
        exchange.send(*tokens(HOSTILE), finish="stop")

    page.goto(link(relay(speak).url, **models("poet")))
    ask(page)
    shown_answer = column(page, 0).locator(".answer")
    assert "<script>document.title = 'run'</script>" in shown_answer.inner_text()
    assert "<img src=x" in shown_answer.inner_text()
    assert shown_answer.locator("script, img, a").count() == 0
    page.get_by_label("Show").select_option("Tokens")
    assert "".join(shown(page, 0)) == HOSTILE
    assert "loradeck" in page.title()


def test_names_of_a_hostile_link_are_text(page: "Page", server: PageServer) -> None:
    name = "<img src=x onerror=alert(1)>"
    hostile = {"columns": [{"model": name}, {"blend": {name: 1, "__proto__": 2}}, 7], "sampling": [], "messages": {}}
    page.goto(link(server.url, prompt=name, **hostile))
    column(page, 1).wait_for()
    assert page.locator(".column").count() == 2
    assert page.locator("main img").count() == 0
    assert column(page, 0).get_attribute("aria-label") == name


def test_a_link_opens_the_same_state(page: "Page", context: "BrowserContext", server: PageServer) -> None:
    content = {
        "prompt": "Well?",
        "system": "Be brief.",
        "messages": [user("One?"), {"role": "assistant", "content": "First."}],
        "columns": [{"model": "poet", "pinned": True}, {"blend": {"poet": 0.7, "pirate": 0.3}, "answers": ["Other."]}],
        "sampling": {"temperature": 0, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "max_tokens": 9, "seed": 3},
        "display": "tokens",
        "colour": "probability",
    }
    page.goto(link(server.url, **content))
    until_state(page, lambda state: state == content)
    ask(page)
    other = context.new_page()
    other.goto(page.url)
    other.get_by_label("Prompt").wait_for()
    assert other.get_by_label("Prompt").input_value() == "Well?"
    assert other.get_by_label("Top k").input_value() == "4"
    assert other.get_by_label("Show").input_value() == "Tokens by probability"
    ask(other)
    assert [shown(other, index) for index in (0, 1)] == [shown(page, index) for index in (0, 1)]
    assert state(other) == content


def test_ten_thousand_adapters_are_suggested_by_what_was_typed(page: "Page", server: PageServer) -> None:
    cards = [{"id": "tiny", "created": 0, "root": "tiny", "parent": None}]
    cards += [{"id": f"adapter-{number}", "created": 0, "root": "x", "parent": "tiny"} for number in range(10_000)]
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": cards}))
    page.goto(link(server.url, **models("")))
    choice = column(page, 0).get_by_label("Model", exact=True)
    choice.fill("adapter-")
    until(lambda: len(suggestions(page)) == 50, page)
    choice.fill("777")
    until(lambda: len(suggestions(page)) == 19, page)  # 777, x777 and 777x
    assert suggestions(page)[0] == "adapter-777"
    choice.fill("poet*0.5+adapter-9999")
    until(lambda: suggestions(page) == ["poet*0.5+adapter-9999"], page)


def test_versions_and_checkpoints_are_suggested(page: "Page", server: PageServer) -> None:
    jobs = [{"id": "ftjob-ab"}, {"id": "ftjob-cd"}]
    checkpoints = [{"fine_tuned_model_checkpoint": f"ftjob-cd:ckpt-{step}"} for step in (12, 6)]
    page.route("**/v1/fine_tuning/jobs?*", lambda route: route.fulfill(json={"object": "list", "data": jobs}))
    page.route("**/ftjob-cd/checkpoints", lambda route: route.fulfill(json={"object": "list", "data": checkpoints}))
    page.goto(link(server.url, **models("")))
    choice = column(page, 0).get_by_label("Model", exact=True)
    choice.fill("ftjob-c")
    until(lambda: suggestions(page) == ["ftjob-cd:ckpt-12", "ftjob-cd:ckpt-6"], page)
    choice.fill("poet@")
    until(lambda: suggestions(page) == ["poet@2", "poet@1"], page)


# ---- elsewhere


def commands(page: "Page") -> dict[str, str]:
    column(page, 0).get_by_role("button", name="Code").click()
    dialog = page.get_by_role("dialog", name="The same question elsewhere")
    return {
        title: dialog.locator(f"pre[aria-label={title!r}]").inner_text() for title in ("curl", "Python", "Command line")
    }


def test_the_question_can_be_asked_elsewhere(page: "Page", context: "BrowserContext", server: PageServer) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    prompt = 'It\'s "quoted" \\ $HOME — ünï'
    page.goto(link(server.url, **models("poet*0.7+pirate*0.3", prompt=prompt)))
    expected = answer(server, "poet*0.7+pirate*0.3", [user(prompt)])["message"]["content"]
    lines = commands(page)
    page.get_by_role("button", name="Copy curl").click()
    page.get_by_text("Copied: curl").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == lines["curl"]
    done = subprocess.run(["bash", "-c", lines["curl"]], capture_output=True, check=True, timeout=TIMEOUT)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == expected
    pytest.importorskip("openai")
    done = subprocess.run([sys.executable, "-c", lines["Python"]], capture_output=True, check=True, timeout=TIMEOUT)
    assert done.stdout.decode().rstrip("\n") == expected.rstrip("\n")
    line = lines["Command line"].replace("| loradeck chat", f"| {sys.executable} -m loradeck chat")
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True, timeout=TIMEOUT)
    assert b"pirate=0.3" in done.stdout
    assert b"loradeck chat --server" in lines["Command line"].encode()


def test_with_keys_a_command_takes_the_key_from_the_environment(
    page: "Page", make_server: Callable[..., PageServer], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[root]\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\n')
    server = make_server("--keys", str(keys))
    page.goto(link(server.url, **models("poet")))
    page.get_by_label("API key of this server").fill("secret")
    page.get_by_role("button", name="Use it").click()
    ask(page)
    lines = commands(page)
    assert not any("secret" in line for line in lines.values())
    environment = os.environ | {"LORADECK_KEY": "secret"}
    done = subprocess.run(["bash", "-c", lines["curl"]], capture_output=True, check=True, env=environment)
    expected = json.loads(done.stdout)["choices"][0]["message"]["content"]
    pytest.importorskip("openai")
    done = subprocess.run([sys.executable, "-c", lines["Python"]], capture_output=True, check=True, env=environment)
    assert done.stdout.decode().rstrip("\n") == expected.rstrip("\n")


# ---- by keyboard alone


def test_all_is_done_by_keyboard(page: "Page", server: PageServer) -> None:
    page.goto(link(server.url, **models("poet", "pirate", prompt="", display="tokens")))
    column(page, 1).wait_for()

    def tab_to(found: str) -> None:
        while not page.evaluate(f"(() => {{ const at = document.activeElement; return {found}; }})()"):
            page.keyboard.press("Tab")

    tab_to("at.id === 'compare-prompt'")
    page.keyboard.type("Tell me")
    page.keyboard.press("Enter")
    for index in range(2):
        column(page, index).get_by_text(LONG).wait_for()
    tab_to("at.className === 'tokens text'")
    column(page, 0).locator(".token-details").wait_for()
    tab_to("at.getAttribute('aria-label') === 'Remove pirate'")
    page.keyboard.press("Enter")
    assert page.locator(".column").count() == 1
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Model"


def test_a_phone_shows_columns_below_each_other(page: "Page", server: PageServer) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(link(server.url, **BLEND | {"columns": [{"blend": {"poet": 1, "pirate": 2}}, {"model": "x" * 90}]}))
    column(page, 1).wait_for()
    ask_button = page.get_by_role("button", name="Ask all")
    ask_button.click()
    column(page, 0).get_by_text(LONG).wait_for()
    first, second = column(page, 0).bounding_box(), column(page, 1).bounding_box()
    assert first is not None
    assert second is not None
    assert second["y"] >= first["y"] + first["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
