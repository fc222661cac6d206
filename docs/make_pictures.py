"""Draw docs/pictures/ as SVG, in light and dark: `python docs/make_pictures.py`. A test finds them out of date."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).with_name("pictures")
SANS = "ui-sans-serif, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"


@dataclass(frozen=True)
class Theme:
    """The colours of a page: GitHub's, light or dark."""

    name: str
    text: str
    muted: str
    line: str
    fill: str
    pirate: str
    poet: str


THEMES = (
    Theme("light", "#1f2328", "#59636e", "#8c959f", "#f6f8fa", "#bc4c00", "#8250df"),
    Theme("dark", "#f0f6fc", "#9198a1", "#6e7681", "#151b23", "#f0883e", "#ab7df8"),
)


class Drawing:
    """SVG elements in the order they are drawn; lengths in pixels, y downwards."""

    def __init__(self, theme: Theme, width: int, height: int, title: str) -> None:
        self.theme, self.width, self.height, self.title = theme, width, height, title
        self.elements: list[str] = []

    def text(
        self, x: float, y: float, words: str, colour: str = "", *, size: int = 13, anchor: str = "middle",
        mono: bool = False, bold: bool = False,
    ) -> None:  # fmt: skip
        """Write a line whose middle is at height y."""
        self.elements.append(
            f'<text x="{x:g}" y="{y + size * 0.35:g}" font-size="{size}" font-weight="{600 if bold else 400}" '
            f'text-anchor="{anchor}" fill="{colour or self.theme.text}" font-family="{MONO if mono else SANS}">'
            f"{escape(words)}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str = "", *, dashed: bool = False) -> None:
        """Draw a rounded rectangle."""
        dashes = "5 4" if dashed else "none"
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{self.theme.fill}" '
            f'stroke="{colour or self.theme.line}" stroke-width="1.5" stroke-dasharray="{dashes}"/>'
        )

    def path(self, points: str, colour: str = "", *, width: float = 1.5, arrow: bool = False) -> None:
        """Draw a line along the points, in SVG's path language."""
        colour = colour or self.theme.line
        head = f' marker-end="url(#{self.arrow(colour)})"' if arrow else ""
        self.elements.append(f'<path d="{points}" fill="none" stroke="{colour}" stroke-width="{width:g}"{head}/>')

    def arrow(self, colour: str) -> str:
        """Return the name of an arrow head of this colour."""
        name = f"arrow{colour.strip('#')}"
        head = (
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
        )
        if head not in self.elements:
            self.elements.insert(0, head)
        return name

    def step(self, x: float, y: float, width: float, name: str, *lines: str, colour: str = "") -> None:
        """Draw a box with a name and smaller lines under it."""
        self.box(x, y, width, 64, colour)
        self.text(x + width / 2, y + 17, name, colour, mono=True, bold=True)
        for number, line in enumerate(lines):
            self.text(x + width / 2, y + 36 + 16 * number, line, self.theme.muted, size=12)

    def svg(self) -> str:
        """Return the file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                *self.elements,
                "</svg>\n",
            ]
        )


def idea(theme: Theme) -> Drawing:
    """A batch of five rows through one base, each on through its own adapters."""
    picture = Drawing(theme, 860, 330, "One batch: every row goes through the base and its own adapters")
    lanes = [70, 115, 160, 205, 250]
    routes = [
        ("Where is Rome?", '"pirate"', theme.pirate, (("pirate", 2.5),), "Arrr, in Italy!"),
        ("Where is Rome?", '"poet"', theme.poet, (("poet", 2.5),), "O Tiber, tell…"),
        ("Where is Rome?", "None", theme.muted, (), "In Italy."),
        ("What is salt?", "{poet: 0.7, pirate: 0.3}", theme.poet, (("poet", 3.2), ("pirate", 1.4)), "Salt, arr, O sea"),
        ("Hello!", '"pirate"', theme.pirate, (("pirate", 2.5),), "Ahoy, matey!"),
    ]
    adapters = {"pirate": (95, theme.pirate), "poet": (225, theme.poet)}
    picture.text(120, 28, "a batch, with its route", bold=True)
    picture.text(388, 28, "the base, frozen", bold=True)
    picture.text(598, 28, "a bank of adapters", bold=True)
    picture.text(800, 28, "y", bold=True, mono=True)
    picture.box(323, 45, 130, 230)
    picture.text(388, 150, "one copy", theme.muted)
    picture.text(388, 170, "for all rows", theme.muted)
    picture.box(525, 45, 146, 230)
    for lane, (prompt, route, colour, weights, answer) in zip(lanes, routes, strict=True):
        picture.text(12, lane - 8, prompt, anchor="start")
        picture.text(12, lane + 9, route, colour, anchor="start", mono=True, size=12)
        picture.path(f"M232 {lane}L321 {lane}", arrow=True)
        for name, width in weights:
            y, stroke = adapters[name]
            picture.path(f"M454 {lane}C490 {lane} 500 {y} 548 {y}", stroke, width=width)
            picture.path(f"M648 {y}C690 {y} 690 {lane} 742 {lane}", stroke, width=width, arrow=name == weights[0][0])
        if not weights:
            picture.path(f"M454 {lane}L742 {lane}", arrow=True)
        picture.text(752, lane, answer, colour, anchor="start")
    for name, (y, colour) in adapters.items():
        picture.box(548, y - 26, 100, 52, colour)
        picture.text(598, y - 9, name, colour, mono=True, bold=True)
        picture.text(598, y + 11, "+ B (A x)", theme.muted, size=12, mono=True)
    picture.box(323, 295, 348, 28, dashed=True)
    picture.text(497, 309, "on disk: thousands more, a few megabytes each", theme.muted, size=12)
    picture.path("M598 294L598 277", arrow=True)
    picture.text(682, 309, "loaded in milliseconds", theme.muted, size=12, anchor="start")
    return picture


def row(theme: Theme) -> Drawing:
    """From bank.route to the kernel."""
    picture = Drawing(theme, 860, 300, "A row's way: from bank.route to the kernel")
    accent = theme.poet
    picture.text(12, 22, "once per route", anchor="start", bold=True)
    picture.step(12, 38, 190, "bank.route(rows)", "names and weights,", "one entry per row")
    picture.step(242, 38, 170, "lora/routing", "which adapters,", "at which weight")
    picture.step(452, 38, 180, "ops/mapping", "rows as numbers;", "no tensor is touched")
    picture.step(672, 38, 176, "ops/segments", "row indices sorted", "by adapter: int arrays")
    for x in (202, 412, 632):
        picture.path(f"M{x} 70L{x + 38} 70", arrow=True)
    picture.text(12, 140, "at every adapted module", anchor="start", bold=True)
    picture.step(12, 156, 190, "lora/layer", "y = base(x), then asks", "for the thread's route")
    picture.step(242, 156, 170, "ops/dispatch", "picks the kernel,", "here and nowhere else")
    picture.path("M202 188L240 188", arrow=True)
    picture.path("M107 220L107 258L130 258", arrow=True)
    picture.text(138, 258, "no route, or None only: y as it is", theme.muted, size=12, anchor="start")
    picture.path("M760 102L760 126L327 126L327 154", arrow=True)
    kernels = [
        ("autograd", "training, linear layers"),
        ("cpu", "C, compiled once; linear layers"),
        ("gpu", "Triton, linear layers"),
        ("portable", "torch, any layer and device"),
    ]
    for number, (name, what) in enumerate(kernels):
        y = 146 + 36 * number
        picture.path(f"M412 188C432 188 430 {y + 14} 450 {y + 14}", arrow=True)
        picture.box(452, y, 280, 28, accent)
        picture.text(462, y + 14, name, accent, anchor="start", mono=True, bold=True)
        picture.text(534, y + 14, what, theme.muted, anchor="start", size=12)
        picture.path(f"M732 {y + 14}C746 {y + 14} 738 214 754 214", arrow=number == 0)
    picture.text(758, 208, "y + Σ w s B A x", anchor="start", mono=True, size=11)
    picture.text(758, 226, "see ops/reference", theme.muted, anchor="start", size=11)
    return picture


def step(theme: Theme) -> Drawing:
    """From a row's token to its logits, in one call of C."""
    picture = Drawing(theme, 860, 400, "A row's way through the compiled step")
    accent = theme.poet
    picture.text(
        12, 22, "native/step.c: one call, phases that a team of threads takes unit by unit", anchor="start", bold=True
    )
    picture.step(12, 42, 176, "embed", "the token's row of", "the embedding")
    picture.box(12, 126, 836, 184, dashed=True)
    picture.text(116, 142, "for each layer; rows are normed, matrices are multiplied tile by tile", anchor="start")
    first = [
        ("norms.h", "x = norm(hidden);", "h = A x of q, k, v"),
        ("product.h", "q, k, v = W x + B h,", "normed and turned"),
        ("attention.h", "k, v to the row's page;", "softmax(q k) v"),
        ("adapters.h", "h = A x of o, each at", "its own rank"),
    ]
    second = [
        ("product.h", "o = W x + B h", "added to hidden"),
        ("norms.h", "x = norm(hidden);", "h = A x of gate, up"),
        ("product.h", "gate · up,", "each W x + B h"),
        ("product.h", "h = A x; down = W x + B h,", "added to hidden"),
    ]
    for y, phases in ((154, first), (236, second)):
        for number, (name, *lines) in enumerate(phases):
            x = 24 + 208 * number
            picture.step(
                x, y, 190, name, *lines, colour=accent if "A x" in "".join(lines) or "B h" in "".join(lines) else ""
            )
            if number:
                picture.path(f"M{x - 18} {y + 32}L{x - 2} {y + 32}", arrow=True)
    picture.path("M100 106L100 152", arrow=True)
    picture.path("M743 218L743 227L119 227L119 234", arrow=True)
    picture.step(12, 326, 176, "norm, head", "of the rows that", "need logits")
    picture.path("M743 300L743 318L100 318L100 324", arrow=True)
    picture.path("M188 358L244 358", arrow=True)
    picture.step(246, 326, 176, "sampling.h", "in a second call: argmax,", "top-k, the seeded draw")
    picture.text(216, 350, "logits", theme.muted, size=12)
    picture.text(848, 358, "coloured: where a row meets its own adapters", accent, anchor="end", size=12)
    return picture


def request(theme: Theme) -> Drawing:
    """From HTTP to an answer."""
    picture = Drawing(theme, 860, 340, "A request's way: HTTP, the engine's loop, tokens, an answer")
    accent = theme.pirate
    picture.text(12, 22, "api/: asyncio, one task per request", anchor="start", bold=True)
    picture.step(12, 38, 150, "app", "routes, API keys,", "limits")
    picture.step(202, 38, 190, "requests", "a typed body, or an", "error that names the field")
    picture.step(432, 38, 190, "model_name", "“poet*0.7+pirate*0.3”", "to adapters and weights")
    picture.step(662, 38, 186, "generate", "prompt to token ids,", "then engine.submit")
    for x in (162, 392, 622):
        picture.path(f"M{x} 70L{x + 38} 70", arrow=True)
    picture.box(12, 132, 836, 112, dashed=True)
    picture.text(24, 148, "serve/: the engine's thread, one step after the other", anchor="start", bold=True)
    picture.path("M755 102L755 164", arrow=True)
    steps = [
        (662, "scheduler", "fair_queue: who is next;", "adapter_cache, KV cache"),
        (452, "runner", "prompt chunks and single", "tokens in one batch"),
        (242, "sampler", "logits to a token,", "per request"),
        (32, "stop_strings", "text so far; ends the", "request in the loop"),
    ]
    for x, name, *lines in steps:
        picture.step(x, 166, 174, name, *lines, colour=accent)
    for x in (662, 452, 242):
        picture.path(f"M{x} 198L{x - 34} 198", arrow=True)
    picture.text(434, 254, "next step", theme.muted, size=12)
    picture.path("M119 231L119 254L396 254")
    picture.path("M472 254L749 254L749 233", arrow=True)
    picture.step(12, 272, 190, "streaming, responses", "tokens to events,", "or to one JSON answer")
    picture.path("M60 231L60 270", arrow=True)
    picture.path("M202 304L240 304", arrow=True)
    picture.text(250, 304, "the client", anchor="start")
    return picture


def pictures() -> dict[Path, str]:
    """Return every file's text as it should be."""
    return {
        FOLDER / f"{draw.__name__}-{theme.name}.svg": draw(theme).svg()
        for draw in (idea, row, step, request)
        for theme in THEMES
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pictures().items():
        path.write_text(text, encoding="utf-8")
