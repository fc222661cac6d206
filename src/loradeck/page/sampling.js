/** The settings of sampling; an empty field is the server's default. */

import { element } from "./dom.js";

/**
 * @typedef {object} Settings
 * @property {number} [temperature]
 * @property {number} [top_p]
 * @property {number} [top_k]
 * @property {number} [min_p]
 * @property {number} [max_tokens]
 * @property {number} [seed] the same for all columns
 */

/** The defaults of `loradeck chat`. */
export const DEFAULTS = Object.freeze({ temperature: 0.7, top_p: 0.9, max_tokens: 512 });

/** @type {[keyof Settings, string, {min: number, max: number, step: number | "any"}, string][]} */
const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 100, step: "any" }, "1"],
  ["top_p", "Top p", { min: 0.000001, max: 1, step: "any" }, "1"],
  ["top_k", "Top k", { min: 0, max: 2 ** 31, step: 1 }, "all"],
  ["min_p", "Min p", { min: 0, max: 1, step: "any" }, "0"],
  ["max_tokens", "Max tokens", { min: 1, max: 2 ** 31, step: 1 }, "all that fit"],
  ["seed", "Seed", { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 }, "random"],
];

/** The fields, in a form's group. */
export class Sampling {
  /** @type {Map<keyof Settings, HTMLInputElement>} */
  #inputs = new Map();

  /** @param {() => void} onChange */
  constructor(onChange) {
    const labels = FIELDS.map(([name, title, range, placeholder]) => {
      const input = element("input", { type: "number", inputMode: "decimal", placeholder, ...range, oninput: onChange });
      this.#inputs.set(name, input);
      return element("label", {}, title, input);
    });
    this.element = element("div", { class: "row sampling", role: "group", "aria-label": "Sampling" }, ...labels);
  }

  /** @returns {Settings} those that are given and valid */
  get settings() {
    /** @type {Settings} */
    const settings = {};
    for (const [name, input] of this.#inputs) {
      if (input.value !== "" && input.validity.valid) settings[name] = input.valueAsNumber;
    }
    return settings;
  }

  set settings(settings) {
    for (const [name, input] of this.#inputs) {
      const value = settings[name];
      input.value = typeof value === "number" && Number.isFinite(value) ? String(value) : "";
    }
  }

  /** Say what is invalid, at its field; return whether all is valid. */
  check() {
    return [...this.#inputs.values()].every((input) => input.reportValidity());
  }
}
