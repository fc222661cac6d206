/** A column's question as it is asked without the page: by curl, in Python, and on loradeck's command line. */

import { button, element } from "./dom.js";
import { notify } from "./notice.js";
import { chatFields, textFields } from "./question.js";
import { session } from "./session.js";

/** @typedef {import("./question.js").Question} Question */

const KEY = "LORADECK_KEY"; // the environment variable; the page shows no key
const PYTHON_FIELDS = ["top_k", "min_p"]; // that openai's client does not know

/**
 * Return the question as a line for curl.
 * @param {string} model
 * @param {Question} question
 * @param {boolean} isPlain whether the prompt is continued as plain text
 */
export function curl(model, question, isPlain) {
  const path = isPlain ? "v1/completions" : "v1/chat/completions";
  const fields = isPlain ? textFields(model, question) : chatFields(model, question);
  const key = session.rights?.required ? ` -H "authorization: Bearer $${KEY}"` : "";
  return `curl ${quote(url(path))} -H 'content-type: application/json'${key} -d ${quote(JSON.stringify(fields))}`;
}

/**
 * Return the question as a program that uses openai's client.
 * @param {string} model
 * @param {Question} question
 * @param {boolean} isPlain
 */
export function python(model, question, isPlain) {
  const fields = isPlain ? textFields(model, question) : chatFields(model, question);
  const entries = Object.entries(fields);
  const extra = Object.fromEntries(entries.filter(([name]) => PYTHON_FIELDS.includes(name)));
  const lines = entries.filter(([name]) => !PYTHON_FIELDS.includes(name)).map(([name, value]) => `${name}=${literal(value)}`);
  if (Object.keys(extra).length) lines.push(`extra_body=${literal(extra)}`);
  const required = session.rights?.required;
  return [
    ...(required ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(url("v1"))}, api_key=${required ? `os.environ["${KEY}"]` : '"none"'})`,
    `completion = client.${isPlain ? "" : "chat."}completions.create(`,
    ...lines.map((line) => `    ${line},`),
    ")",
    `print(completion.choices[0].${isPlain ? "text" : "message.content"})`,
  ].join("\n");
}

/**
 * Return the question as a line for `loradeck chat`, which reads a question from each line of its input.
 * @param {string} model
 * @param {Question} question
 */
export function chat(model, { messages, sampling }) {
  const system = messages.find((message) => message.role === "system");
  const questions = messages.filter((message) => message.role === "user").map((message) => message.content);
  const words = ["loradeck", "chat", "--server", quote(url(""))];
  if (model !== session.base) words.push("--adapter", quote(model));
  if (system) words.push("--system", quote(system.content));
  const temperature = sampling.temperature ?? 1;
  words.push("--temperature", String(temperature));
  if (temperature > 0) words.push("--top-p", String(sampling.top_p ?? 1)); // refused where nothing is drawn
  if (sampling.max_tokens !== undefined) words.push("--max-new-tokens", String(sampling.max_tokens));
  if (sampling.seed !== undefined) words.push("--seed", String(sampling.seed));
  const isReadable = questions.every((one) => !one.includes("\n") && !one.trimStart().startsWith("/"));
  return isReadable ? `printf '%s\\n' ${questions.map(quote).join(" ")} | ${words.join(" ")}` : words.join(" ");
}

/**
 * Show all three, each with a button that copies it.
 * @param {string} model
 * @param {Question} question
 * @param {boolean} isPlain
 */
export function showCommands(model, question, isPlain) {
  const left = PYTHON_FIELDS.filter((name) => name in question.sampling);
  const notes = [
    ...(left.length ? [`It has no ${left.join(" and no ")}.`] : []),
    ...(chat(model, question).startsWith("printf") ? [] : ["Type the question then; it is one line."]),
  ];
  const dialog = element(
    "dialog",
    { "aria-label": "The same question elsewhere", onclose: () => dialog.remove() },
    element(
      "div",
      { class: "stack" },
      part("curl", curl(model, question, isPlain)),
      part("Python", python(model, question, isPlain)),
      isPlain ? null : part("Command line", chat(model, question), notes.join(" ")),
      element("div", { class: "row" }, button("Close", () => dialog.close())),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
}

/**
 * @param {string} title
 * @param {string} text
 * @param {string} [note]
 */
function part(title, text, note) {
  const code = element("pre", { class: "card text", tabIndex: 0, role: "group", "aria-label": title }, text);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      notify(`Copied: ${title}`);
    } catch {
      getSelection()?.selectAllChildren(code); // without HTTPS, a browser lets no page write to the clipboard
      notify("Press Ctrl+C to copy what is selected.");
    }
  };
  return element(
    "section",
    {},
    element("div", { class: "row spread" }, element("h2", {}, title), button("Copy", copy, { "aria-label": `Copy ${title}` })),
    code,
    note ? element("p", { class: "muted" }, note) : null,
  );
}

/** @param {string} path */
function url(path) {
  return new URL(path, document.baseURI.split("#")[0]).href.replace(/\/$/, "");
}

/**
 * Return a word as a shell reads it.
 * @param {string} text
 */
function quote(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/**
 * Return a value as Python writes it; strings and numbers are JSON's.
 * @param {any} value
 * @returns {string}
 */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value && typeof value === "object") {
    return `{${Object.entries(value).map(([name, one]) => `${literal(name)}: ${literal(one)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
