/** What the server refused, line by line. */

import { element } from "./dom.js";

/**
 * Return an error as a list: what failed, then each problem.
 * @param {unknown} error
 */
export function refusal(error) {
  const text = error instanceof Error ? error.message : String(error);
  const [first, ...lines] = text.split("\n").filter((line) => line.trim());
  const items = lines.map((line) => element("li", { class: "text" }, line.trim().replace(/^[-•*] /, "")));
  return element(
    "div",
    { role: "alert", class: "error refusal" },
    element("p", { class: "text" }, first),
    items.length > 0 && element("ul", {}, ...items),
  );
}
