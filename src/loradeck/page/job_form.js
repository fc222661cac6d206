/** The form of a new job: a model, a name, and settings, each of which has a default. */

import { element, replace } from "./dom.js";
import { session } from "./session.js";

/**
 * A setting of a job; `setting` is its name in a plan.
 * @typedef {{name: string, label: string, group: "hyperparameters" | "lora", setting?: string, text?: boolean, value?: string,
 *   hint?: string}} Field
 */

/** @type {Field[]} */
const FIELDS = [
  { name: "n_epochs", label: "Epochs", group: "hyperparameters", setting: "epochs" },
  { name: "batch_size", label: "Batch size", group: "hyperparameters", setting: "batch_size" },
  { name: "learning_rate", label: "Learning rate", group: "lora", setting: "learning_rate" },
];
/** @type {Field} */
const BETA = { name: "beta", label: "Beta", group: "hyperparameters", setting: "dpo_beta" };
/** @type {Field[]} */
const MORE = [
  { name: "learning_rate_multiplier", label: "Learning rate multiplier", group: "hyperparameters", hint: "of the default learning rate" },
  { name: "r", label: "Rank (r)", group: "lora", setting: "r" },
  { name: "lora_alpha", label: "Alpha (lora_alpha)", group: "lora", setting: "lora_alpha" },
  { name: "lora_dropout", label: "Dropout", group: "lora", setting: "lora_dropout" },
  { name: "target_modules", label: "Target modules", group: "lora", setting: "target_modules", text: true, hint: "all-linear, attention, or names with commas between" },
  { name: "last_layers", label: "Last layers only", group: "lora", hint: "how many" },
  { name: "max_steps", label: "Steps, instead of epochs", group: "lora" },
  { name: "max_length", label: "Tokens of an example, at most", group: "lora" },
  { name: "valid_ratio", label: "Share held out for validation", group: "lora", hint: "such as 0.1" },
  { name: "patience", label: "Patience", group: "lora", hint: "evaluations without a lower validation loss before it ends" },
  { name: "samples", label: "Samples at each evaluation", group: "lora", value: "2", hint: "validation prompts that are answered" },
];

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
  /** @type {Map<string, {field: Field, input: HTMLInputElement}>} */
  const inputs = new Map();
  /** @param {Field} field */
  const entry = (field) => {
    const id = `job-${field.name}`;
    const input = element("input", {
      id,
      name: field.name,
      value: field.value ?? "",
      placeholder: "auto",
      ...(field.text ? { autocomplete: "off", spellcheck: false } : { type: "number", step: "any", min: "0" }),
      "aria-describedby": field.hint ? `${id}-hint` : null,
    });
    inputs.set(field.name, { field, input });
    return labelled(field.label, input, field.hint);
  };
  const models = [session.base, ...session.adapters.map(({ id }) => id)];
  const model = element("select", { id: "job-model" }, ...models.map((id) => element("option", {}, id)));
  const suffix = element("input", { id: "job-suffix", maxLength: 64, autocomplete: "off", spellcheck: false, "aria-describedby": "job-suffix-hint" });
  const seed = element("input", { id: "job-seed", type: "number", min: "0", step: "1", placeholder: "auto" });
  const validation = element(
    "select",
    { id: "job-validation" },
    element("option", { value: "" }, "none"),
    ...files.map(({ id, filename }) => element("option", { value: id }, filename)),
  );
  const type = element("select", { id: "job-method" }, element("option", { value: "supervised" }, "supervised"), element("option", { value: "dpo" }, "DPO"));
  type.value = method;
  const beta = entry(BETA);
  beta.hidden = method !== "dpo";
  type.addEventListener("change", () => (beta.hidden = type.value !== "dpo"));
  const error = element("p", { class: "error text", role: "alert" });
  const start = element("button", { class: "primary" }, "Start training");

  const body = () => {
    /** @type {Record<"hyperparameters" | "lora", Record<string, any>>} */
    const groups = { hyperparameters: {}, lora: {} };
    for (const { field, input } of inputs.values()) {
      const text = input.value.trim();
      if (text && (field !== BETA || type.value === "dpo")) groups[field.group][field.name] = field.text ? names(text) : Number(text);
    }
    return {
      model: model.value,
      training_file: file,
      validation_file: validation.value || null,
      suffix: suffix.value.trim() || null,
      seed: seed.value ? Number(seed.value) : null,
      method: { type: type.value, [type.value]: { hyperparameters: groups.hyperparameters } },
      lora: groups.lora,
    };
  };
  let timer = 0;
  const form = element(
    "form",
    {
      class: "card stack",
      "aria-label": "New job",
      noValidate: true,
      oninput: () => {
        clearTimeout(timer);
        timer = setTimeout(() => onChange(body()), 300);
      },
      onsubmit: (/** @type {SubmitEvent} */ event) => {
        event.preventDefault();
        onStart(body());
      },
    },
    element("h2", {}, "New job"),
    element(
      "div",
      { class: "fields" },
      labelled("Train", model, "the base, or an adapter to go on from"),
      labelled("Name of the adapter", suffix, nameHint()),
      labelled("Method", type),
      ...FIELDS.map(entry),
      beta,
      labelled("Seed", seed),
      labelled("Validation file", validation, "uploaded like the dataset"),
    ),
    element("details", {}, element("summary", {}, "More settings"), element("div", { class: "fields" }, ...MORE.map(entry))),
    error,
    element("div", {}, start),
  );

  /**
   * Show why the server refuses the job, at the field that caused it; null: it does not.
   * @param {import("./api.js").ApiError | null} refusal
   */
  const refuse = (refusal) => {
    replace(error, refusal?.message);
    const cause = refusal?.param?.split(".").at(-1) ?? "";
    for (const input of form.querySelectorAll("input, select")) {
      input.toggleAttribute("aria-invalid", cause !== "" && input.id === `job-${cause}`);
    }
  };
  /**
   * Show the values that the server takes where none is given.
   * @param {import("./job_plan.js").Plan} plan
   */
  const showDefaults = (plan) => {
    const values = new Map(plan.settings.map(({ name, value }) => [name, value]));
    values.set("learning_rate", String(Number(plan.learning_rate.toPrecision(3))));
    suffix.placeholder = plan.name;
    for (const { field, input } of inputs.values()) {
      if (field.setting) input.placeholder = values.get(field.setting) ?? "auto";
    }
  };
  /** @param {boolean} busy */
  const setBusy = (busy) => (start.disabled = busy);
  return { element: form, body, refuse, showDefaults, setBusy };
}

/**
 * @param {string} text
 * @param {HTMLInputElement | HTMLSelectElement} input
 * @param {string} [hint]
 */
function labelled(text, input, hint) {
  return element(
    "div",
    { class: "field" },
    element("label", { for: input.id }, text),
    input,
    hint ? element("small", { class: "muted", id: `${input.id}-hint` }, hint) : null,
  );
}

function nameHint() {
  const create = session.rights?.create ?? [];
  return create.includes("*") ? "a new version if it exists" : `this key may create: ${create.join(", ")}`;
}

/** @param {string} text */
function names(text) {
  return text.includes(",") ? text.split(",").map((name) => name.trim()).filter(Boolean) : text;
}
