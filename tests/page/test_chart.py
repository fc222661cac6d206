"""The line chart, in a real browser: curves, axes, legend, read-out, zoom, log scale, and what thinning must keep."""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page
    from tests.page.conftest import PageServer

SHOW = """async (series) => {
  const { lineChart } = await import("/page/chart.js");
  const chart = lineChart({ label: "Test", x: "step", y: "loss" });
  document.body.replaceChildren(chart.element);
  chart.set(series);
}"""


@pytest.fixture
def chart(page: "Page", server: "PageServer") -> "Chart":
    page.goto(server.url)
    page.get_by_role("heading").first.wait_for()
    return Chart(page)


class Chart:
    """A chart that is alone on the page."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        self.plot: Locator = page.get_by_role("slider")

    def show(self, *series: tuple[str, list[list[float]]]) -> None:
        """Show curves, and wait until they are drawn."""
        self.page.evaluate(SHOW, [{"name": name, "points": points} for name, points in series])
        self.settle()

    def settle(self) -> None:
        """Wait for what is drawn in the next frame."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def paths(self) -> list[str]:
        return self.plot.locator("svg svg path.curve").evaluate_all("all => all.map((path) => path.getAttribute('d'))")

    def texts(self) -> list[str]:
        return self.plot.locator("text").all_text_contents()

    def says(self) -> str | None:
        self.settle()
        return self.plot.get_attribute("aria-valuetext")

    def point(self, share: float) -> tuple[float, float]:
        """Return where the mouse points at a share of the horizontal axis."""
        box: Any = self.plot.bounding_box()
        return box["x"] + 60 + share * (box["width"] - 72), box["y"] + 100


def line(count: int) -> list[list[float]]:
    return [[step, 1 / (step + 1)] for step in range(count)]


def test_curves_and_axes(chart: Chart) -> None:
    chart.show(("loss", [[0, 1], [10, 3], [20, 2]]))
    (path,) = chart.paths()
    assert (path.count("M"), path.count("L")) == (1, 2)
    assert {"step", "loss", "0", "20", "1.0", "3.0"} <= {*chart.texts()}
    assert chart.says() == "step 20, loss 2"


def test_without_points(chart: Chart) -> None:
    chart.show(("loss", []))
    assert chart.paths() == [""]
    assert "nothing yet" in chart.texts()
    assert chart.says() == "nothing yet"


def test_many_points_are_thinned_out_and_keep_their_extremes(chart: Chart) -> None:
    points: list[list[float]] = [[step, 1.0] for step in range(5000)]
    points[2501][1], points[3333][1] = 9.0, -7.0
    chart.show(*((f"job {number}", points) for number in range(10)))
    width: Any = chart.plot.evaluate("plot => plot.clientWidth")
    paths = chart.paths()
    assert len(paths) == 10
    for path in paths:
        assert path.count("L") < 2 * 4 * width
        heights = {float(each.split(" ")[1]) for each in path[1:].split("L")}
        assert len(heights) == 3
        assert 0 < min(heights) < 20
        assert 172 < max(heights) < 192


def test_gaps_and_single_points(chart: Chart) -> None:
    chart.page.evaluate(
        SHOW.replace("chart.set(series)", "chart.set([{name: 'a', points: [[0, 1], [1, NaN], [2, 1], [3, 2]]}])")
    )
    chart.settle()
    (path,) = chart.paths()
    assert (path.count("M"), path.count("L"), path.count("h0")) == (2, 1, 1)


def test_read_out_at_the_pointer(chart: Chart) -> None:
    chart.show(("loss", line(101)), ("validation", [[0, 5], [50, 4], [100, 3]]))
    chart.page.mouse.move(*chart.point(0.602))
    assert chart.says() == "step 60, loss 0.0164, validation 4"
    assert chart.plot.locator("circle").count() == 2
    assert chart.page.get_by_role("button", name="validation").text_content() == "validation4"
    chart.page.mouse.move(0, 700)
    assert chart.says() == "step 100, loss 9.9e-3, validation 3"
    assert chart.plot.locator("circle").count() == 0


def test_zoom_by_dragging(chart: Chart) -> None:
    chart.show(("loss", line(101)))
    whole = chart.paths()
    chart.page.mouse.move(*chart.point(0.2))
    chart.page.mouse.down()
    chart.page.mouse.move(*chart.point(0.4), steps=3)
    chart.settle()
    assert chart.plot.locator("rect").count() == 1
    chart.page.mouse.up()
    chart.page.get_by_role("button", name="Show all").wait_for()
    assert "30" in chart.texts()
    assert not {"0", "60", "100"} & {*chart.texts()}
    assert chart.paths() != whole
    chart.page.mouse.dblclick(*chart.point(0.5))
    chart.page.get_by_role("button", name="Show all").wait_for(state="hidden")
    assert chart.paths() == whole


def test_the_keyboard_reads_and_zooms(chart: Chart) -> None:
    chart.show(("loss", line(101)))
    chart.plot.focus()
    for key, says in (
        ("ArrowLeft", "step 99, loss 0.01"),
        ("ArrowLeft", "step 98, loss 0.0101"),
        ("ArrowRight", "step 99, loss 0.01"),
        ("Home", "step 0, loss 1"),
        ("ArrowLeft", "step 0, loss 1"),
        ("PageUp", "step 10, loss 0.0909"),
    ):
        chart.page.keyboard.press(key)
        assert chart.says() == says
    chart.page.keyboard.press("+")
    chart.page.get_by_role("button", name="Show all").wait_for()
    chart.page.keyboard.press("-")
    chart.page.get_by_role("button", name="Show all").wait_for(state="hidden")
    chart.page.keyboard.press("+")
    chart.page.keyboard.press("Escape")
    chart.page.get_by_role("button", name="Show all").wait_for(state="hidden")


def test_log_scale(chart: Chart) -> None:
    chart.show(("loss", [[0, 100.0], [1, 0.0], [2, 1.0], [3, 0.01]]))
    chart.page.get_by_label("log scale").check()
    chart.settle()
    assert {"100", "10", "1", "0.1", "0.01"} <= {*chart.texts()}
    (path,) = chart.paths()
    assert (path.count("M"), path.count("L")) == (2, 1)  # there is no 0
    heights = [float(text) for text in path.replace("h0", "").replace("M", " ").replace("L", " ").split()[1::2]]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_the_legend_hides_curves(chart: Chart) -> None:
    chart.show(("small", [[0, 1], [1, 2]]), ("large", [[0, 1000], [1, 2000]]))
    entry = chart.page.get_by_role("button", name="large")
    entry.click()
    chart.settle()
    assert entry.get_attribute("aria-pressed") == "false"
    assert chart.paths()[1] == ""
    assert "2.0" in chart.texts()
    assert chart.says() == "step 1, small 2"
    entry.click()
    chart.settle()
    assert chart.paths()[1]


def test_names_are_text(chart: Chart) -> None:
    name = "<img src=x onerror=alert(1)>"
    chart.show((name, [[0, 1], [1, 2]]))
    chart.page.get_by_text(name).wait_for()
    assert chart.page.locator("img").count() == 0
