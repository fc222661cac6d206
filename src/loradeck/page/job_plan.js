/** The plan of a job: its sizes, and its settings with the reason for each. */

import { element } from "./dom.js";
import { count, number, size } from "./format.js";

/**
 * The answer of `POST /v1/fine_tuning/plan`.
 * @typedef {{name: string, examples: number, validation_examples: number, tokens: number, supervised: number,
 *   longest: number, truncated: number, steps: number, total_tokens: number, trainable: number, adapter_bytes: number,
 *   memory_bytes: number, settings: {name: string, value: any, reason: string}[], notes: string[]}} Plan
 */

/**
 * Return a plan as it is read before the job starts.
 * @param {Plan} plan
 */
export function jobPlan(plan) {
  const facts = {
    Adapter: plan.name,
    Examples: `${count(plan.examples)}${plan.truncated ? `, ${count(plan.truncated)} of them cut` : ""}`,
    "Validation examples": count(plan.validation_examples),
    "Tokens of an epoch": `${count(plan.tokens)}, of which ${count(plan.supervised)} are learned`,
    "Longest example": `${count(plan.longest)} tokens`,
    Steps: `${count(plan.steps)}, of ${count(plan.total_tokens)} tokens in all`,
    "Trained parameters": `${count(plan.trainable)}, ${size(plan.adapter_bytes)}`,
    "Memory while it trains": size(plan.memory_bytes),
  };
  const rows = plan.settings.map(({ name, value, reason }) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      element("td", {}, settingText(value)),
      element("td", { class: "muted" }, reason),
    ),
  );
  const head = ["setting", "value", "why"].map((text) => element("th", { scope: "col" }, text));
  return element(
    "section",
    { class: "card stack", "aria-label": "Plan" },
    element("h2", {}, "Plan"),
    element(
      "dl",
      { class: "plan-facts" },
      ...Object.entries(facts).flatMap(([term, text]) => [
        element("dt", {}, term),
        element("dd", { class: "text" }, text),
      ]),
    ),
    element(
      "table",
      { class: "text" },
      element("thead", {}, element("tr", {}, ...head)),
      element("tbody", {}, ...rows),
    ),
    plan.notes.length > 0 && element("ul", { class: "text" }, ...plan.notes.map((note) => element("li", {}, note))),
  );
}

/**
 * Return a setting's value as people write it.
 * @param {any} value
 * @returns {string}
 */
export function settingText(value) {
  if (Array.isArray(value)) return value.map(settingText).join(", ");
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : number(value);
  return typeof value === "string" ? value : JSON.stringify(value);
}
