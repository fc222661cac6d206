/** The plan of a job: its sizes, and its settings with the reason for each. */

import { element } from "./dom.js";
import { count, number, size } from "./format.js";

/**
 * The answer of `POST /v1/fine_tuning/plan`.
 * @typedef {object} Plan
 * @property {string} name
 * @property {string} form
 * @property {number} examples
 * @property {number} validation_examples
 * @property {number} tokens
 * @property {number} supervised
 * @property {number} longest
 * @property {number} truncated
 * @property {number} steps
 * @property {number} total_tokens
 * @property {number} trainable
 * @property {number} adapter_bytes
 * @property {number} memory_bytes
 * @property {number} learning_rate
 * @property {{name: string, value: string, reason: string}[]} settings
 * @property {string[]} notes
 */

/**
 * Return a plan as it is read before the job starts.
 * @param {Plan} plan
 */
export function jobPlan(plan) {
  const learned = plan.tokens ? ` (${((100 * plan.supervised) / plan.tokens).toFixed(0)} % learned)` : "";
  const facts = Object.entries({
    Adapter: plan.name,
    Examples: count(plan.examples) + (plan.truncated ? `, ${count(plan.truncated)} of them cut` : ""),
    "Validation examples": plan.validation_examples ? count(plan.validation_examples) : "none",
    "Tokens of one epoch": `${count(plan.tokens)}${learned}, the longest example ${count(plan.longest)}`,
    Steps: count(plan.steps),
    "Tokens in all": count(plan.total_tokens),
    "Learning rate": number(plan.learning_rate),
    "Trained parameters": count(plan.trainable),
    "Adapter's size": size(plan.adapter_bytes),
    "Memory while it trains": size(plan.memory_bytes),
  });
  const rows = plan.settings.map(({ name, value, reason }) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value), element("td", { class: "muted" }, reason)),
  );
  return element(
    "section",
    { class: "card stack", "aria-label": "Plan" },
    element("h2", {}, "Plan"),
    element("dl", { class: "facts" }, ...facts.flatMap(([term, text]) => [element("dt", {}, term), element("dd", { class: "text" }, text)])),
    element(
      "table",
      { class: "text" },
      element("thead", {}, element("tr", {}, ...["setting", "value", "why"].map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, ...rows),
    ),
    plan.notes.length > 0 && element("ul", { class: "text" }, ...plan.notes.map((note) => element("li", {}, note))),
  );
}
