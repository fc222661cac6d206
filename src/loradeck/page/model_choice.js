/** A field for a model: the base, an adapter, a version, a checkpoint or the text of a blend, with suggestions. */

import { get } from "./api.js";
import { element, replace } from "./dom.js";
import { session } from "./session.js";

const SHOWN = 50; // suggestions; there may be 10,000 adapters
const JOBS = 5; // whose checkpoints are looked up

let count = 0;
/** @type {Map<string, Promise<string[]>>} */
const versions = new Map();

export class ModelChoice {
  #suggestions = element("datalist", { id: `models-${(count += 1)}` });

  /**
   * @param {string} label
   * @param {(name: string) => void} onChoose
   */
  constructor(label, onChoose) {
    this.input = element("input", {
      type: "text", autocomplete: "off", spellcheck: false, placeholder: label, "aria-label": label,
      oninput: () => this.#suggest(),
      onfocus: () => this.#suggest(),
      onchange: () => onChoose(this.value),
    });
    this.input.setAttribute("list", this.#suggestions.id);
    this.element = element("span", { class: "choice" }, this.input, this.#suggestions);
  }

  /** @returns {string} */
  get value() {
    return this.input.value.trim();
  }

  set value(name) {
    this.input.value = name;
    this.input.title = name;
  }

  focus() {
    this.input.focus();
    this.input.select();
  }

  async #suggest() {
    const typed = this.value;
    const start = typed.slice(0, typed.lastIndexOf("+") + 1); // of a blend, the last part is suggested
    const names = await candidates(typed.slice(start.length)).catch(() => []); // suggestions only
    if (typed !== this.value) return;
    replace(this.#suggestions, ...names.map((name) => element("option", { value: start + name })));
  }
}

/**
 * Return the names to suggest for what was typed, those that begin with it first.
 * @param {string} typed
 */
async function candidates(typed) {
  const part = typed.toLowerCase();
  const name = typed.slice(0, typed.indexOf("@"));
  const names = typed.includes("@") ? await versionsOf(name) : session.models.map((model) => model.id);
  if (typed.startsWith("ftjob-") && session.rights?.train) names.push(...(await checkpoints(typed)));
  const matches = [];
  const rest = [];
  for (const one of names) {
    const at = one.toLowerCase().indexOf(part);
    if (at === 0) matches.push(one);
    else if (at > 0 && rest.length < SHOWN) rest.push(one);
    if (matches.length >= SHOWN) break;
  }
  return [...matches, ...rest].slice(0, SHOWN);
}

/**
 * @param {string} name
 * @returns {Promise<string[]>}
 */
async function versionsOf(name) {
  if (!versions.has(name)) {
    const path = `v1/adapters/${encodeURIComponent(name)}/versions`;
    versions.set(name, get(path).then(({ data }) => data.map((/** @type {{id: string}} */ card) => card.id)));
    setTimeout(() => versions.delete(name), 10_000); // a version may be published at any time
  }
  return [...(await /** @type {Promise<string[]>} */ (versions.get(name)))];
}

/** @param {string} typed the beginning of `ftjob-…:ckpt-12` */
async function checkpoints(typed) {
  const [id] = typed.split(":");
  const jobs = (await get("v1/fine_tuning/jobs?limit=100")).data.filter((/** @type {{id: string}} */ job) => job.id.startsWith(id));
  const pages = await Promise.all(
    jobs.slice(0, JOBS).map((/** @type {{id: string}} */ job) => get(`v1/fine_tuning/jobs/${job.id}/checkpoints`)),
  );
  return pages.flatMap(({ data }) =>
    data.map((/** @type {{fine_tuned_model_checkpoint: string}} */ checkpoint) => checkpoint.fine_tuned_model_checkpoint),
  );
}
