/** A part of the page that scrolls by itself, by the keyboard too, so that the page itself never does so sideways. */

import { element } from "./dom.js";

/**
 * @param {string} label
 * @param {HTMLElement} content
 */
export function scrollArea(label, content) {
  return element("div", { class: "scroll", role: "region", "aria-label": label, tabIndex: 0 }, content);
}
