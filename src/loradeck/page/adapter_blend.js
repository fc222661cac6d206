/** A blend of adapters saved as a new one. */

import * as address from "./address.js";
import { post } from "./api.js";
import { button, element, replace } from "./dom.js";
import { nameInput } from "./name_input.js";
import { refusal } from "./refusal.js";
import { session } from "./session.js";

/**
 * Return the form.
 * @param {string[]} ids the adapters to begin with
 * @param {(model: import("./session.js").Model) => void} onPublished called with what the server made of it
 */
export function adapterBlend(ids, onPublished) {
  /** @type {Map<string, number>} */
  const weights = new Map();
  const parts = element("div", { class: "stack" });
  const other = element("input", { id: "blend-other", autocomplete: "off" });
  const rank = element("input", { id: "blend-rank", type: "number", min: 1, max: 4096, step: 1 });
  const name = nameInput("Name of the blend");
  const tryIt = element("a", {}, "Try it in Compare");
  const send = element("button", { class: "primary" }, "Save the blend");
  const problems = element("div");

  /**
   * @param {string} id
   * @param {number} weight
   */
  function add(id, weight) {
    if (!id || weights.has(id)) return;
    /** @type {Record<string, any>} */
    const range = { min: -1, max: 2, step: 0.05, value: weight, "aria-label": `Weight of ${id}` };
    const slider = element("input", { type: "range", ...range, oninput: () => set(slider.valueAsNumber) });
    const field = element("input", { type: "number", ...range, "aria-label": `Weight of ${id}, as a number` });
    Object.assign(field, { step: "any", min: "", max: "" });
    field.addEventListener("input", () => field.value && set(field.valueAsNumber));
    /** @param {number} value */
    const set = (value) => {
      weights.set(id, value);
      slider.value = String(value);
      if (field.valueAsNumber !== value) field.value = String(value);
      change();
    };
    const leaveOut = button("×", () => { part.remove(); weights.delete(id); change(); }, { class: "quiet", "aria-label": `Leave out ${id}` });
    const part = element("div", { class: "blend-part" }, element("span", { class: "text" }, id), slider, field, leaveOut);
    parts.append(part);
    set(weight);
  }

  function change() {
    send.disabled = !weights.size;
    tryIt.href = address.link("compare", { columns: [{ model: session.base }, { blend: Object.fromEntries(weights) }] });
  }

  /** @param {SubmitEvent} event */
  async function submit(event) {
    event.preventDefault();
    send.disabled = true;
    replace(problems);
    const used = [...weights].filter(([, weight]) => weight);
    const limit = rank.value ? { max_rank: rank.valueAsNumber } : {};
    try {
      onPublished(await post("v1/adapters/combine", { name: name.input.value, weights: Object.fromEntries(used), ...limit }));
    } catch (error) {
      replace(problems, refusal(error));
    }
    send.disabled = false;
  }

  /** @param {Event} event */
  function addOther(event) {
    event.preventDefault();
    add(other.value.trim(), 0.5);
    other.value = "";
  }

  /** @param {KeyboardEvent} event */
  function onKey(event) {
    if (event.key === "Enter") addOther(event);
  }
  other.addEventListener("keydown", onKey);
  for (const id of ids) add(id, Number((1 / ids.length).toFixed(2)));
  change();
  return element(
    "form",
    { class: "stack", onsubmit: submit },
    parts,
    element("div", { class: "row" }, element("label", { for: "blend-other" }, "Another adapter"), other, button("Add", addOther)),
    element("div", { class: "row" }, element("label", { for: "blend-rank" }, "Highest rank, if it is to be lowered"), rank),
    name.element,
    element("div", { class: "row" }, send, session.rights?.task === "generate" && tryIt),
    problems,
  );
}
