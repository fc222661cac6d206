/** The ten adapters that are asked most. */

import { element, replace } from "./dom.js";
import { count, number } from "./format.js";
import { history } from "./metrics.js";

const MINUTE = 60;
const MOST = 10;
const REQUESTS = "loradeck_adapter_requests_total";
const TOKENS = "loradeck_adapter_generation_tokens_total";
const NAMES = new Map([
  ["<base>", "the base"],
  ["<blend>", "blends"],
  ["<other>", "all others"],
]);

/**
 * Return the table, and a function that draws it from the newest metrics.
 * @returns {{element: HTMLElement, draw: () => void}}
 */
export function adapterTraffic() {
  const rows = element("tbody");
  const titles = ["Adapter", "Tokens/s", "Requests/s", "Tokens", "Requests"];
  const heads = titles.map((title, index) => element("th", { scope: "col", class: index ? "number" : null }, title));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), rows);
  const empty = element("p", { class: "empty" }, "No requests since this page was opened.");
  const note = element("p", { class: "muted" }, "Per second: the last minute. Counts: since this page was opened, an hour at most.");
  const shown = element("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Traffic by adapter" }, table, note);

  function draw() {
    const busiest = traffic();
    const most = Math.max(...busiest.map(({ tokens }) => tokens)) || 1;
    replace(rows, ...busiest.map((each) => adapterRow(each, most)));
    shown.hidden = !busiest.length;
    empty.hidden = busiest.length > 0;
  }
  return { element: element("div", { class: "card" }, element("h2", {}, "Busiest adapters"), shown, empty), draw };
}

/** Return what the busiest adapters have done. */
function traffic() {
  const last = history.times.length - 1;
  const all = history.series(REQUESTS).map(({ labels: { adapter } }) => ({
    adapter,
    tokenRate: history.rate(TOKENS, MINUTE, { adapter }),
    requestRate: history.rate(REQUESTS, MINUTE, { adapter }),
    tokens: history.growth(TOKENS, 0, last, { adapter }),
    requests: history.growth(REQUESTS, 0, last, { adapter }),
  }));
  const active = all.filter(({ requests, tokens }) => requests || tokens);
  return active.sort((one, other) => other.tokens - one.tokens || other.requests - one.requests).slice(0, MOST);
}

/**
 * @param {ReturnType<typeof traffic>[number]} traffic
 * @param {number} most tokens of any adapter
 */
function adapterRow({ adapter, tokenRate, requestRate, tokens, requests }, most) {
  const bar = element("div", { class: "traffic-bar" });
  bar.style.width = `${(100 * tokens) / most}%`;
  const cells = [number(tokenRate), number(requestRate), count(tokens), count(requests)];
  return element(
    "tr",
    {},
    element("th", { scope: "row", class: "text" }, NAMES.get(adapter) ?? adapter, bar),
    ...cells.map((text) => element("td", { class: "number" }, text)),
  );
}
