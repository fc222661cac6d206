/** The field for a new adapter's name, which says what is wrong with one before the server does. */

import { element } from "./dom.js";
import { matches } from "./pattern.js";
import { session } from "./session.js";

const RESERVED = /[/\\@*+:,"<>|?=\p{C}]/gu; // paths, versions, blends, and what does not print
const MOST = 128; // characters
let last = 0;

/**
 * Return the field.
 * @param {string} label
 */
export function nameInput(label) {
  const id = `name-${(last += 1)}`;
  const input = element("input", { id, required: true, autocomplete: "off", "aria-describedby": `${id}-note`, oninput: check });
  const note = element("span", { id: `${id}-note`, class: "muted" });

  /** Say what will happen to this name. */
  function check() {
    const name = input.value;
    const problem = name ? problemOf(name) : "";
    input.setCustomValidity(problem);
    note.classList.toggle("error", problem !== "");
    const version = session.adapters.find((model) => model.id === name)?.adapter?.version;
    note.textContent = problem || (version ? `It becomes version ${version + 1} of ${name}.` : "");
  }
  check();
  return { input, check, element: element("div", { class: "row" }, element("label", { for: id }, label), input, note) };
}

/**
 * Return a valid name that is close to another; "" if there is none.
 * @param {string} name
 */
export function validName(name) {
  return name.replace(RESERVED, "-").replace(/^[ .]+/, "").slice(0, MOST).replace(/[ .]+$/, "");
}

/** @param {string} name */
function problemOf(name) {
  if (name !== validName(name)) return "A name has letters, digits, “.”, “_” and “-”, and does not start with a dot.";
  const patterns = session.rights?.create ?? [];
  return matches(name, patterns) ? "" : `This API key may create: ${patterns.join(", ") || "nothing"}.`;
}
