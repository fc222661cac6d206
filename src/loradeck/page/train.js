/** The view "train". */

import { element } from "./dom.js";

/** @returns {import("./app.js").View} */
export function create() {
  return { element: element("section", {}, element("h1", {}, "Train")), show() {} };
}
