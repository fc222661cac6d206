"""Markdown as elements: what models write, what the hostile write, and text that grows."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from tests.page.conftest import PageServer

SHOW = """async (steps) => {
  const { MarkdownView } = await import("/page/markdown.js");
  const view = new MarkdownView();
  for (const text of steps) view.set(text);
  return view.element.innerHTML;
}"""
LINK = '<a href="{0}" rel="noopener noreferrer" target="_blank">{1}</a>'
CASES = {
    "One\ntwo\n\nthree": "<p>One\ntwo</p><p>three</p>",
    "# A *b* #\n## C": "<h3>A <em>b</em></h3><h4>C</h4>",
    "**a** __b__ *c* _d_ ~~e~~ ***f***": "<p><strong>a</strong> <strong>b</strong> <em>c</em> <em>d</em> <s>e</s> <strong><em>f</em></strong></p>",
    "snake_case_name 2 * 3 * 4 **open": "<p>snake_case_name 2 * 3 * 4 **open</p>",
    "**a *b** c*": "<p><strong>a *b</strong> c*</p>",
    "`a*b*` ``c`d`` `open": "<p><code>a*b*</code> <code>c`d</code> `open</p>",
    r"\*a\* \<b> 1\. x": "<p>*a* &lt;b&gt; 1. x</p>",
    "```python\nif a < b:\n    *c*\n\n# d\n```\nafter": '<pre tabindex="0"><code>if a &lt; b:\n    *c*\n\n# d</code></pre><p>after</p>',
    "~~~\nopen": '<pre tabindex="0"><code>open</code></pre>',
    "- a\n- b\n  - c\n\n    d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul></li><li><p>e</p></li></ul>",
    "Text:\n3. a\n4. b": "<p>Text:\n3. a\n4. b</p>",
    "3. a\n4. b\n   - c\n\nafter": '<ol start="3"><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li></ol><p>after</p>',
    "1. a\n```\ncode\n```": '<ol start="1"><li><p>a</p></li></ol><pre tabindex="0"><code>code</code></pre>',
    "> a\n> > b\nlazy": "<blockquote><p>a</p><blockquote><p>b\nlazy</p></blockquote></blockquote>",
    "a\n\n---\n***": "<p>a</p><hr><hr>",
    "[a *b*](https://c.d/e_(f)) <https://g.h> https://i.j/k.": f"<p>{LINK.format('https://c.d/e_(f)', 'a <em>b</em>')} {LINK.format('https://g.h', 'https://g.h')} {LINK.format('https://i.j/k', 'https://i.j/k')}.</p>",
    "[a](javascript:alert) ![b](https://c.d/e.png)": f'<p><span title="javascript:alert">a</span> {LINK.format("https://c.d/e.png", "b")}</p>',
    "[a](data:text/html,x) [b](/v1/files)": '<p><span title="data:text/html,x">a</span> <span title="/v1/files">b</span></p>',
    "<b onclick=x>a</b> &lt; <!-- c -->": "<p>&lt;b onclick=x&gt;a&lt;/b&gt; &amp;lt; &lt;!-- c --&gt;</p>",
    "a \uE000b **c\uE000d**": '<p>a <span class="parting" role="img" aria-label="parts here"></span>b <strong>c<span class="parting" role="img" aria-label="parts here"></span>d</strong></p>',
}  # fmt: skip
TABLE = "| a | `b` |\n|---|:-:|\n| 1 | 2 |\n| 3 |\n\nafter"


@pytest.fixture
def opened(page: "Page", server: "PageServer") -> "Page":
    page.goto(server.url)
    return page


def test_what_models_write(opened: "Page") -> None:
    for source, expected in CASES.items():
        assert opened.evaluate(SHOW, [source]) == expected, source
    table = opened.evaluate(SHOW, [TABLE])
    assert "<th>a</th><th><code>b</code></th>" in table
    assert "<tr><td>1</td><td>2</td></tr><tr><td>3</td><td></td></tr>" in table
    assert table.endswith("<p>after</p>")


def test_a_text_that_grows_ends_as_if_it_had_come_at_once(opened: "Page") -> None:
    for source in ["\n\n".join(CASES), TABLE, *CASES]:
        steps = [source[:end] for end in range(1, len(source) + 1)]
        assert opened.evaluate(SHOW, steps) == opened.evaluate(SHOW, [source]), source


def test_only_the_end_of_a_growing_text_is_drawn_again(opened: "Page") -> None:
    nodes = opened.evaluate("""async () => {
      const { MarkdownView } = await import("/page/markdown.js");
      const view = new MarkdownView();
      view.set("a\\n\\nb\\n\\n- c\\n- d");
      const before = [...view.element.querySelectorAll("p, li")];
      view.set("a\\n\\nb\\n\\n- c\\n- d e\\n- f");
      return before.map((node) => view.element.contains(node));
    }""")
    assert nodes == [True, True, True, True, True, False]  # of the item d, the paragraph alone


def test_hostile_texts_take_no_time(opened: "Page") -> None:
    """Each of these, of 20,000 characters, would take seconds if a step were quadratic."""
    hostile = ["*a " * 7000, "_a**b" * 4000, "[" * 20000, "`" * 20000, "`a``b```c" * 2200, "> " * 10000, "- " * 10000,
               "\n".join("  " * depth + "- a" for depth in range(200)), "![a](" * 4000, "|" * 20000, "a|\n|-" * 4000,
               "<https://" * 2000, "**" * 10000, "# " + " " * 20000 + "a", "~~a" * 6000, "\\" * 20000]  # fmt: skip
    for text in hostile:
        seconds = opened.evaluate(
            """async (text) => {
              const { MarkdownView } = await import("/page/markdown.js");
              const start = performance.now();
              new MarkdownView().set(text);
              return (performance.now() - start) / 1000;
            }""",
            text,
        )
        assert seconds < 120, text[:20]
