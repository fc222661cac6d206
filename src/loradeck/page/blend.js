/** A blend: adapters with a weight each, as text and as sliders. */

import { button, element } from "./dom.js";
import { ModelChoice } from "./model_choice.js";

/** @typedef {Map<string, number>} Weights adapters by name, or name@version */

const RANGE = { min: "-1", max: "2", step: "0.05" };
const MAX_ADAPTERS = 64; // the server's limit

/**
 * Return the text of a blend, as the server reads it: `poet*0.7+pirate*0.3`.
 * @param {Weights} weights
 */
export function formatBlend(weights) {
  const parts = [...weights].map(([name, weight]) => {
    return weight === 1 ? name : `${name}*${String(weight).replace("e+", "e")}`; // "+" separates the parts
  });
  return parts.join("+");
}

/**
 * Return the weights of a blend's text; null if it is the name of one model, or none.
 * @param {string} text
 * @returns {Weights | null}
 */
export function parseBlend(text) {
  if (!/[*+]/.test(text)) return null;
  const weights = new Map();
  for (const part of text.split("+")) {
    const [, name, number] = /^\s*(.+?)\s*(?:\*\s*([^*]*?))?\s*$/.exec(part) ?? [];
    const weight = number === undefined ? 1 : Number(number || NaN);
    if (!name || !Number.isFinite(weight)) return null;
    weights.set(name, (weights.get(name) ?? 0) + weight);
  }
  return weights;
}

/** The sliders of a blend. */
export class BlendEditor {
  #rows = element("div", { class: "stack" });

  /**
   * @param {Weights} weights changed in place
   * @param {() => void} onMove called while a slider moves
   * @param {() => void} onChange called once it is released, and when an adapter comes or goes
   */
  constructor(weights, onMove, onChange) {
    this.weights = weights;
    this.onMove = onMove;
    this.onChange = onChange;
    const added = new ModelChoice("Add an adapter", (name) => this.#add(name));
    this.element = element("div", { class: "stack blend", role: "group", "aria-label": "Blend" }, this.#rows, added.element);
    this.added = added;
    for (const name of weights.keys()) this.#rows.append(this.#row(name));
  }

  /** @param {string} name */
  #add(name) {
    this.added.value = "";
    if (!name || this.weights.has(name) || this.weights.size >= MAX_ADAPTERS) return;
    this.weights.set(name, this.weights.size ? 0.5 : 1);
    const row = this.#row(name);
    this.#rows.append(row);
    row.querySelector("input")?.focus();
    this.onChange();
  }

  /** @param {string} name */
  #row(name) {
    const value = String(this.weights.get(name));
    const slider = element("input", { type: "range", ...RANGE, value, "aria-label": `Weight of ${name}` });
    const number = element("input", {
      type: "number", step: "any", min: "-1000000", max: "1000000", value, "aria-label": `Weight of ${name}, as a number`,
    });
    const set = (/** @type {HTMLInputElement} */ from, /** @type {HTMLInputElement} */ to) => {
      if (!from.value || !from.validity.valid) return false;
      to.value = from.value;
      this.weights.set(name, from.valueAsNumber);
      this.onMove();
      return true;
    };
    slider.addEventListener("input", () => set(slider, number));
    slider.addEventListener("change", this.onChange);
    number.addEventListener("change", () => {
      if (set(number, slider)) this.onChange();
      else number.value = String(this.weights.get(name)); // which still holds
    });
    const removed = () => {
      this.weights.delete(name);
      row.remove();
      this.added.focus();
      this.onChange();
    };
    const row = element(
      "div",
      { class: "weight" },
      element("span", { class: "name", title: name }, name),
      slider,
      number,
      button("×", removed, { class: "quiet", "aria-label": `Take ${name} out of the blend` }),
    );
    return row;
  }
}
