"""The view of the server: live figures from its metrics, and the last hour of them."""

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.page.conftest import TIMEOUT, PageServer

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Route


@pytest.fixture
def view(page: "Page", server: PageServer) -> "Page":
    """The page on its view of the server, with the first metrics."""
    page.goto(f"{server.url}/#server")
    figure(page, "Requests running").wait_for()
    return page


def figure(page: "Page", name: str) -> "Locator":
    return page.locator(".figures > *").filter(has_text=name).locator("dd")


def ask(server: PageServer, model: str, tokens: int) -> None:
    body = {"model": model, "prompt": "the rain in", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT).raise_for_status()


def test_figures_follow_a_request(view: "Page", server: PageServer) -> None:
    assert figure(view, "First token, median").inner_text() == "–"
    view.get_by_text("No requests since this page was opened.").wait_for()
    ask(server, "poet", 9)
    ask(server, "poet", 8)
    ask(server, "tiny", 5)
    poet = view.get_by_role("row").filter(has=view.get_by_role("rowheader", name="poet"))
    poet.filter(has_text="17").wait_for()
    assert poet.get_by_role("cell").all_inner_texts()[2:] == ["17", "2"]
    view.get_by_role("rowheader", name="the base").wait_for()
    assert figure(view, "First token, median").inner_text() != "–"
    assert figure(view, "Generated tokens/s").inner_text() != "0"
    assert figure(view, "Adapters on the device").inner_text().startswith("1 · ")
    assert view.locator(".chart").count() == 5
    texts = [plot.get_attribute("aria-valuetext") or "" for plot in view.locator("[aria-valuetext]").all()]
    assert [text.split(", ")[0] for text in texts] == ["now"] * 5
    view.get_by_role("link", name="Adapters").click()
    row = view.get_by_role("row").filter(has=view.get_by_role("button", name="poet", exact=True))
    row.filter(has_text="On the device").wait_for()
    assert row.get_by_role("cell").nth(7).inner_text() == "2"  # its requests


def test_the_busiest_adapters_and_the_running_jobs(page: "Page", server: PageServer) -> None:
    """The metrics are made up: each time they are read, adapter 11 has had 11 requests more, adapter 10 has had 10."""
    reads = 0

    def answer(route: "Route") -> None:
        nonlocal reads
        reads += 1
        lines = [f'loradeck_adapter_requests_total{{adapter="a{each}"}} {each * reads}' for each in range(1, 12)]
        lines += [
            f'loradeck_adapter_generation_tokens_total{{adapter="a{each}"}} {each * reads}' for each in range(1, 12)
        ]
        job = '{job="ftjob-1",name="<b>poet</b>"}'
        lines += ['loradeck_jobs{status="running"} 1', 'loradeck_jobs{status="failed"} 0']
        lines += [f"loradeck_job_steps{job} 3", f"loradeck_job_total_steps{job} 12", f"loradeck_job_loss{job} 1.25"]
        route.fulfill(body="\n".join(lines), content_type="text/plain")

    page.route("**/metrics", answer)
    page.goto(f"{server.url}/#server")
    rows = page.get_by_role("rowheader")
    rows.first.wait_for()
    assert rows.all_inner_texts() == [f"a{each}" for each in range(11, 1, -1)]
    job = page.get_by_role("listitem").filter(has_text="<b>poet</b>")
    assert "3 of 12 steps, loss 1.25" in job.inner_text()
    assert job.get_by_role("link").get_attribute("href") == "#train=%7B%22job%22%3A%22ftjob-1%22%7D"
    page.get_by_text("1 running", exact=True).wait_for()


def test_metrics_are_read_before_the_view_is_opened(page: "Page", server: PageServer) -> None:
    with page.expect_response("**/metrics"):
        page.goto(f"{server.url}/#adapters")


def metrics(page: "Page", server: PageServer, script: str) -> Any:
    """Run a script with a history of its own."""
    page.goto(server.url)
    return page.evaluate(
        f"""async () => {{
          const {{ History, readSeries }} = await import("/page/metrics.js");
          const history = new History();
          {script}
        }}"""
    )


def test_series_are_read_as_prometheus_writes_them(page: "Page", server: PageServer) -> None:
    name = 'a {b="1",} "quoted" \\ back\nline'
    text = 'up{name="a {b=\\\\"1\\\\",} \\\\"quoted\\\\" \\\\\\\\ back\\\\nline",tier="disk"}'
    series = metrics(page, server, f"return readSeries('{text}');")
    assert series == {"name": "up", "labels": {"name": name, "tier": "disk"}}


def test_a_restart_lowers_no_counter(page: "Page", server: PageServer) -> None:
    growth, rate, value, other = metrics(
        page,
        server,
        """
        for (const [time, value] of [[0, 100], [2, 110], [4, 3], [6, 5]]) history.add(`# TYPE\\nn_total ${value}`, time);
        history.add('n_total 5\\nn_total{adapter="poet"} 7', 8);
        return [history.growth("n_total", 0, 3), history.rate("n_total", 4, {}, 3), history.value("n_total"),
          history.growth("n_total", 0, 4, { adapter: "poet" })];
        """,
    )
    assert growth == 15  # 10 before the restart, 5 after it
    assert rate == 5 / 4
    assert value == 12
    assert other == 7  # it had had no request before


def test_an_hour_is_kept(page: "Page", server: PageServer) -> None:
    times, values, gone = metrics(
        page,
        server,
        """
        for (let time = 0; time <= 4000; time += 100) history.add(time < 300 ? "a 1\\nb 2" : `a ${time}`, time);
        return [history.times, history.series("a")[0].values, history.series("b").length];
        """,
    )
    assert times == [*range(400, 4001, 100)]
    assert values == times
    assert gone == 0


def test_quantiles_are_those_of_prometheus(page: "Page", server: PageServer) -> None:
    values = metrics(
        page,
        server,
        """
        const bounds = ["0.1", "0.5", "1.0", "+Inf"];
        const write = (counts) => bounds
          .map((le, index) => `vllm:time_to_first_token_seconds_bucket{le="${le}"} ${counts[index]}`).join("\\n");
        history.add(write([5, 5, 5, 5]), 0);
        history.add(write([5, 15, 25, 25]), 2);
        history.add(write([5, 15, 25, 26]), 4);
        const of = (share, from, to) => history.quantile("vllm:time_to_first_token_seconds", share, from, to);
        return [of(0.25, 0, 1), of(0.5, 0, 1), of(0.75, 0, 1), of(0.99, 1, 2), of(0.5, 0, 0)];
        """,
    )
    assert values[:4] == pytest.approx([0.3, 0.5, 0.75, 1.0])
    assert values[4] != values[4]  # nothing was counted


def test_an_idle_server_has_no_negative_axis(view: "Page") -> None:
    chart = view.locator(".chart").filter(has_text="Requests")
    chart.locator(".grid text").filter(has_text="0.5").wait_for()
    assert not [text for text in chart.locator(".grid text").all_text_contents() if text.startswith("-")]
