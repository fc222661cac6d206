/** The checkpoints of a job, each of which can be asked like a model. */

import * as address from "./address.js";
import { element, replace } from "./dom.js";
import { count, number } from "./format.js";
import { scrollArea } from "./scroll_area.js";
import { session } from "./session.js";

/**
 * @typedef {{fine_tuned_model_checkpoint: string, step_number: number,
 *   metrics: {train_loss?: number, valid_loss?: number}}} Checkpoint
 */

/** Return the table, and a function that changes what it shows. */
export function checkpointTable() {
  const head = ["step", "loss", "validation loss", "ask"].map((text) => element("th", { scope: "col" }, text));
  const body = element("tbody");
  const content = element("table", {}, element("thead", {}, element("tr", {}, ...head)), body);
  const table = scrollArea("Table of checkpoints", content);
  const card = element("section", { class: "card", hidden: true }, element("h2", {}, "Checkpoints"), table);
  let shown = "";
  /** @param {Checkpoint[]} checkpoints */
  const set = (checkpoints) => {
    const models = JSON.stringify(checkpoints.map((each) => each.fine_tuned_model_checkpoint));
    if (models === shown) return; // so that the focus stays
    shown = models;
    card.hidden = checkpoints.length === 0;
    replace(body, ...checkpoints.map(row));
  };
  return { element: card, set };
}

/** @param {Checkpoint} checkpoint */
function row({ fine_tuned_model_checkpoint: model, step_number: step, metrics }) {
  const losses = [metrics.train_loss, metrics.valid_loss].map((loss) => element("td", {}, number(loss ?? NaN)));
  const link = compareLink(model, `Open step ${step} in Compare`);
  return element("tr", {}, element("th", { scope: "row" }, count(step)), ...losses, element("td", {}, link));
}

/**
 * Return a link that asks a model beside the base; none if the base does not generate.
 * @param {string} model
 * @param {string} text
 */
export function compareLink(model, text) {
  if (session.rights?.task !== "generate") return null;
  const columns = [{ model: session.base }, { model }];
  return element("a", { class: "button", href: address.link("compare", { columns }) }, text);
}
