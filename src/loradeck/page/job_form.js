/** The form of a new job: a model, a name, and settings, each of which has a default. */

import { element, replace } from "./dom.js";
import { settingText } from "./job_plan.js";
import { session } from "./session.js";

/** @typedef {[label: string, hint?: string]} Field */

/** @type {Record<string, Field>} OpenAI's words */
const HYPERPARAMETERS = {
  n_epochs: ["Epochs"],
  batch_size: ["Batch size"],
  learning_rate_multiplier: ["Learning rate multiplier", "of the default learning rate"],
  beta: ["Beta"],
};
/** @type {Record<string, Field>} our words */
const LORA = {
  learning_rate: ["Learning rate"],
  r: ["Rank (r)"],
  lora_alpha: ["Alpha (lora_alpha)"],
  lora_dropout: ["Dropout"],
  target_modules: ["Target modules", "all-linear, attention, or names with commas between"],
  last_layers: ["Last layers only", "how many"],
  max_steps: ["Steps", "instead of epochs"],
  max_length: ["Longest example", "in tokens; longer ones are cut"],
  valid_ratio: ["Share held out for validation", "such as 0.1"],
  patience: ["Patience", "evaluations without a lower validation loss before it ends"],
  samples: ["Samples at each evaluation", "validation prompts that are answered"],
};
const FIRST = ["n_epochs", "batch_size", "learning_rate", "beta"]; // the others are under "More settings"
const TEXT = "target_modules"; // the others are numbers
/** @type {Record<string, string>} what a plan calls them, if otherwise */
const PLANNED = { n_epochs: "epochs", beta: "dpo_beta" };
const SAMPLES = "2";
const AUTO = "auto";
const PAUSE = 300; // milliseconds after a change before the plan follows it

/**
 * Return the form of a job on a file.
 * @param {object} options
 * @param {string} options.file its id
 * @param {"supervised" | "dpo"} options.method that suits it
 * @param {{id: string, filename: string}[]} options.files that it may be validated on
 * @param {(body: any) => void} options.onChange called with the body of the request, a moment after each change
 * @param {(body: any) => void} options.onStart
 */
export function jobForm({ file, method, files, onChange, onStart }) {
  const numeric = { type: "number", min: "0", step: "any", placeholder: AUTO };
  const inputs = Object.fromEntries(
    Object.keys({ ...HYPERPARAMETERS, ...LORA }).map((name) => [name, input(name, name === TEXT ? {} : numeric)]),
  );
  if (session.rights?.task === "generate") inputs.samples.value = SAMPLES;
  const model = select("model", [session.base, ...session.adapters.map(({ id }) => id)].map((id) => [id, id]));
  const type = select("method", Object.entries({ supervised: "supervised", dpo: "DPO" }));
  const validation = select("validation_file", [["", "none"], ...files.map(({ id, filename }) => [id, filename])]);
  const suffix = input("suffix", { maxLength: 64 });
  const seed = input("seed", { ...numeric, step: "1" });
  const error = element("p", { class: "error text", role: "alert" });
  const start = element("button", { class: "primary" }, "Start training");

  /** @param {string} name */
  const field = (name) => labelled(inputs[name], ...(HYPERPARAMETERS[name] ?? LORA[name]));
  const beta = field("beta");
  const showMethod = () => (beta.hidden = type.value !== "dpo");
  type.value = method;
  type.addEventListener("change", showMethod);
  showMethod();

  /** @param {Record<string, Field>} fields */
  const values = (fields) => {
    const filled = Object.keys(fields).filter((name) => inputs[name].value.trim() && (name !== "beta" || !beta.hidden));
    return Object.fromEntries(
      filled.map((name) => [name, name === TEXT ? names(inputs[name].value) : Number(inputs[name].value)]),
    );
  };
  const body = () => ({
    model: model.value,
    training_file: file,
    validation_file: validation.value || null,
    suffix: suffix.value.trim() || null,
    seed: seed.value ? Number(seed.value) : null,
    method: { type: type.value, [type.value]: { hyperparameters: values(HYPERPARAMETERS) } },
    lora: values(LORA),
  });

  let timer = 0;
  const more = Object.keys(inputs).filter((name) => !FIRST.includes(name));
  const form = element(
    "form",
    {
      class: "card stack",
      "aria-label": "New job",
      noValidate: true, // the server says what is wrong
      oninput: () => {
        clearTimeout(timer);
        timer = setTimeout(() => onChange(body()), PAUSE);
      },
      onsubmit: (/** @type {SubmitEvent} */ event) => {
        event.preventDefault();
        const unreadable = [...Object.values(inputs), seed].find(({ validity }) => validity.badInput);
        if (!unreadable) return onStart(body());
        unreadable.closest("details")?.setAttribute("open", "");
        unreadable.reportValidity(); // an unreadable number has no value, and would be left out
      },
    },
    element("h2", {}, "New job"),
    element(
      "div",
      { class: "fields" },
      labelled(model, "Train", "the base, or an adapter to go on from"),
      labelled(suffix, "Name of the adapter", nameHint()),
      labelled(type, "Method"),
      ...FIRST.map((name) => (name === "beta" ? beta : field(name))),
      labelled(seed, "Seed"),
      labelled(validation, "Validation file", "uploaded as the dataset was"),
    ),
    element(
      "details",
      {},
      element("summary", {}, "More settings"),
      element("div", { class: "fields" }, ...more.map(field)),
    ),
    error,
    element("div", {}, start),
  );

  return {
    element: form,
    body,
    /**
     * Show why the server refuses the job, at the field that caused it; null: it does not.
     * @param {import("./api.js").ApiError | null} refusal
     */
    refuse(refusal) {
      replace(error, refusal?.message);
      const cause = refusal?.param?.split(".").at(-1);
      for (const each of form.querySelectorAll("input, select")) {
        if (each.id === `job-${cause}`) each.setAttribute("aria-invalid", "true");
        else each.removeAttribute("aria-invalid");
      }
    },
    /**
     * Show what the server takes where nothing is given.
     * @param {import("./job_plan.js").Plan} plan
     */
    showDefaults(plan) {
      suffix.placeholder = plan.name;
      const settings = new Map(plan.settings.map(({ name, value }) => [name, settingText(value)]));
      for (const [name, input] of Object.entries(inputs)) {
        input.placeholder = settings.get(PLANNED[name] ?? name) ?? (name === TEXT ? "" : AUTO);
      }
    },
    /** @param {boolean} busy */
    setBusy(busy) {
      start.disabled = busy;
    },
  };
}

/**
 * @param {string} name
 * @param {Record<string, any>} properties
 */
function input(name, properties) {
  return element("input", { id: `job-${name}`, autocomplete: "off", spellcheck: false, ...properties });
}

/**
 * @param {string} name
 * @param {string[][]} options each with its value and text
 */
function select(name, options) {
  return element("select", { id: `job-${name}` }, ...options.map(([value, text]) => element("option", { value }, text)));
}

/**
 * @param {HTMLInputElement | HTMLSelectElement} control
 * @param {string} label
 * @param {string} [hint]
 */
function labelled(control, label, hint) {
  const id = `${control.id}-hint`;
  if (hint) control.setAttribute("aria-describedby", id);
  const note = hint && element("small", { class: "muted", id }, hint);
  return element("div", { class: "field" }, element("label", { for: control.id }, label), control, note);
}

function nameHint() {
  const create = session.rights?.create ?? [];
  return create.includes("*") ? "a new version, if it exists" : `this key may create: ${create.join(", ")}`;
}

/** @param {string} text */
function names(text) {
  const all = text.split(",").map((name) => name.trim());
  return all.length > 1 ? all.filter(Boolean) : all[0];
}
