/** What the server's check says of a dataset: form, sizes, problems, and what is learned of the first examples. */

import { element } from "./dom.js";
import { count } from "./format.js";
import { scrollArea } from "./scroll_area.js";

/** @typedef {[text: string, learned: boolean][]} Spans */
/**
 * @typedef {{records: number, examples: number, total: number, supervised: number, truncated: number,
 *   duplicates: number, leaked: number, labels: Record<string, number>,
 *   lengths: {min: number, median: number, p95: number, max: number} | null}} Split
 */
/** @typedef {{message: string, locations: string[], records: number, hint: string}} Problem a cause, and where it is */
/**
 * The answer of `GET /v1/files/{id}/check`.
 * @typedef {{form: string, method: "supervised" | "dpo", unit: string, splits: Record<string, Split>, notes: string[],
 *   problems: Problem[], problem_count: number, problem_records: number,
 *   first: {spans: Spans, rejected: Spans | null}[]}} FileCheck
 */

/**
 * Return what a check says.
 * @param {FileCheck} check
 */
export function datasetCheck(check) {
  const { form, method, problem_count, problem_records, problems, notes, first } = check;
  return element(
    "div",
    { class: "card stack" },
    element("p", {}, "Form: ", element("strong", {}, form), method === "dpo" && ", preference pairs for DPO"),
    sizes(check),
    problem_count === 0
      ? element("p", { class: "good" }, "No problems.")
      : element(
          "p",
          { class: "error", role: "alert" },
          plural(problem_count, "problem"),
          problem_records > 0 && ` in ${plural(problem_records, "record")}`, // else of the file as a whole
          ": mend the file, and drop it again.",
        ),
    problem_count > 0 &&
      element(
        "ul",
        { class: "text problems", "aria-label": "Problems" },
        ...problems.map(problemEntry),
        problem_count > problems.length && element("li", {}, `and ${count(problem_count - problems.length)} more`),
      ),
    notes.length > 0 && element("ul", { class: "text" }, ...notes.map((note) => element("li", {}, note))),
    ...labels(check),
    first.length > 0 &&
      element(
        "details",
        { open: true },
        element("summary", {}, "The first examples: ", mark("underlined"), " is what is learned"),
        ...first.flatMap(({ spans, rejected }, index) => [
          example(`Example ${index + 1}`, spans),
          rejected && example(`Example ${index + 1}, rejected`, rejected),
        ]),
      ),
  );
}

/** @param {FileCheck} check */
function sizes({ splits, unit }) {
  const heads = ["split", "records", "examples", "shortest", "median", "95 %", "longest", unit, "learned", "cut"];
  heads.push("twice", "in train");
  const rows = Object.entries(splits).map(([name, split]) => {
    const { records, examples, lengths, total, supervised, truncated, duplicates, leaked } = split;
    const { min, median, p95, max } = lengths ?? { min: 0, median: 0, p95: 0, max: 0 };
    const texts = [records, examples, min, median, p95, max, total].map(count);
    texts.push(`${((100 * supervised) / (total || 1)).toFixed(1)} %`, ...[truncated, duplicates, leaked].map(count));
    const cells = texts.map((text) => element("td", { class: "number" }, text));
    return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
  });
  const head = heads.map((text, index) => element("th", { scope: "col", class: index ? "number" : "" }, text));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  return scrollArea("Sizes", table);
}

/** @param {Problem} problem */
function problemEntry({ message, locations, records, hint }) {
  const others = locations.slice(1).join(", ") + (records > locations.length ? ", …" : "");
  return element(
    "li",
    {},
    locations.length > 0 && element("code", {}, locations[0], ": "),
    message,
    records > 1 && ` (in ${plural(records, "record")}: also ${others})`,
    hint && element("div", { class: "muted" }, hint),
  );
}

/** @param {FileCheck} check */
function labels({ splits }) {
  return Object.entries(splits).map(([name, split]) => {
    const texts = Object.entries(split.labels).map(([label, times]) => `${label} (${count(times)})`);
    return texts.length > 0 && element("p", { class: "text" }, `Labels of ${name}: ${texts.join(", ")}`);
  });
}

/**
 * @param {string} title
 * @param {Spans} spans
 */
function example(title, spans) {
  const texts = spans.map(([text, learned]) => (learned ? mark(text) : text));
  return scrollArea(title, element("pre", { class: "card text" }, ...texts));
}

/** @param {string} text */
function mark(text) {
  return element("mark", { class: "learned" }, text);
}

/**
 * @param {number} number
 * @param {string} noun
 */
function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}
