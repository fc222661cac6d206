/** The question for an API key. It stays in this tab's sessionStorage. */

import { key } from "./api.js";
import { button, element } from "./dom.js";

let isOpen = false;

/**
 * Ask for an API key; return whether one was given.
 * @returns {Promise<boolean>}
 */
export function askForKey() {
  if (isOpen) return Promise.resolve(false);
  isOpen = true;
  return new Promise((resolve) => {
    const input = element("input", { type: "password", id: "key-input", autocomplete: "off", required: true });
    const form = element(
      "form",
      { method: "dialog", onsubmit: () => (key.value = input.value.trim()) },
      element("label", { for: "key-input" }, "API key of this server"),
      input,
      element("p", {}, "It is kept in this tab until the tab is closed."),
      element("div", { class: "row" }, element("button", { class: "primary" }, "Use it"), button("Cancel", () => dialog.close())),
    );
    const dialog = element("dialog", { "aria-label": "API key" }, form);
    dialog.addEventListener("close", () => {
      const hasKey = dialog.returnValue !== "" || (key.value !== "" && key.value === input.value.trim());
      dialog.remove();
      isOpen = false;
      resolve(hasKey);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
