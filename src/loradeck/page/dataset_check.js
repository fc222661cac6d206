/** What the server's check says of a dataset: its form, sizes and problems, and what is learned of the first examples. */

import { element } from "./dom.js";
import { count } from "./format.js";

/**
 * @typedef {object} Split
 * @property {number} records
 * @property {number} examples
 * @property {{min: number, median: number, p95: number, max: number} | null} lengths
 * @property {number} total
 * @property {number} supervised
 * @property {number} truncated
 * @property {number} duplicates
 * @property {number} leaked
 * @property {Record<string, number>} labels
 */

/**
 * The answer of `GET /v1/files/{id}/check`.
 * @typedef {object} FileCheck
 * @property {string} form
 * @property {"supervised" | "dpo"} method
 * @property {string} unit of the lengths
 * @property {Record<string, Split>} splits
 * @property {string[]} notes
 * @property {{location: string, message: string}[]} problems
 * @property {number} problem_count
 * @property {{spans: [string, boolean][]}[]} first
 */

/**
 * Return what a check says.
 * @param {FileCheck} check
 */
export function datasetCheck(check) {
  const { problem_count: problems, form } = check;
  const verdict = problems
    ? element("p", { class: "error", role: "alert" }, `${count(problems)} ${problems === 1 ? "problem" : "problems"}: fix or remove these records, and drop the file again.`)
    : element("p", { class: "good" }, "No problems.");
  return element(
    "div",
    { class: "stack" },
    element("p", {}, "Form: ", element("strong", {}, form), check.method === "dpo" && " · preference pairs, for DPO"),
    splitTable(check),
    verdict,
    problems > 0 && problemList(check),
    check.notes.length > 0 && element("ul", { class: "text" }, ...check.notes.map((note) => element("li", {}, note))),
    ...labelLists(check),
    check.first.length > 0 && examples(check),
  );
}

/** @param {FileCheck} check */
function splitTable({ splits, unit }) {
  const heads = ["split", "records", "examples", "shortest", "median", "95 %", "longest", unit, "learned", "cut", "twice", "in train"];
  const rows = Object.entries(splits).map(([name, split]) => {
    const { min, median, p95, max } = split.lengths ?? { min: NaN, median: NaN, p95: NaN, max: NaN };
    const share = split.total ? `${((100 * split.supervised) / split.total).toFixed(1)} %` : "–";
    const numbers = [split.records, split.examples, min, median, p95, max, split.total].map((value) => (Number.isNaN(value) ? "–" : count(value)));
    const rest = [split.truncated, split.duplicates, split.leaked].map(count);
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      ...[...numbers, share, ...rest].map((text) => element("td", { class: "number" }, text)),
    );
  });
  const head = heads.map((text, index) => element("th", { scope: "col", class: index ? "number" : "" }, text));
  return scrolling(
    "Sizes of the dataset",
    element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)),
  );
}

/** @param {FileCheck} check */
function problemList({ problems, problem_count }) {
  const more = problem_count - problems.length;
  return element(
    "ul",
    { class: "text problems", "aria-label": "Problems" },
    ...problems.map(({ location, message }) => element("li", {}, location && element("code", {}, location), location && ": ", message)),
    more > 0 && element("li", {}, `and ${count(more)} more`),
  );
}

/** @param {FileCheck} check */
function labelLists({ splits }) {
  return Object.entries(splits)
    .filter(([, { labels }]) => Object.keys(labels).length)
    .map(([name, { labels }]) =>
      element(
        "p",
        { class: "text" },
        `Labels of ${name}: `,
        Object.entries(labels).map(([label, times]) => `${label} (${count(times)})`).join(", "),
      ),
    );
}

/** @param {FileCheck} check */
function examples({ first }) {
  return element(
    "details",
    { open: true },
    element("summary", {}, "The first examples: what is ", element("mark", { class: "learned" }, "learned"), " is underlined, the rest is only read"),
    ...first.map(({ spans }, index) =>
      scrolling(
        `Example ${index + 1}`,
        element(
          "pre",
          { class: "card text" },
          ...spans.map(([text, learned]) => (learned ? element("mark", { class: "learned" }, text) : text)),
        ),
      ),
    ),
  );
}

/**
 * Return an element that scrolls by itself, by the keyboard too.
 * @param {string} label
 * @param {HTMLElement} content
 */
function scrolling(label, content) {
  return element("div", { class: "scroll", role: "region", "aria-label": label, tabIndex: 0 }, content);
}
