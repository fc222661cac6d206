/** The view of the store: its adapters as a table, and what can be done with them. */

import * as address from "./address.js";
import { adapterBlend } from "./adapter_blend.js";
import { COLUMNS, select } from "./adapter_columns.js";
import { adapterComparison } from "./adapter_comparison.js";
import { adapterDetails, answersLink } from "./adapter_details.js";
import { AdapterTable } from "./adapter_table.js";
import { adapterUpload } from "./adapter_upload.js";
import { button, element, replace } from "./dom.js";
import { count } from "./format.js";
import { history } from "./metrics.js";
import { notify } from "./notice.js";
import { removal } from "./removal.js";
import { session } from "./session.js";

/** @typedef {import("./adapter_columns.js").Adapter} Adapter */

const PERIOD = 5000; // milliseconds between two looks at the store
const SHARE = 20; // a look takes a twentieth of the time at most

/** @returns {import("./app.js").View} */
export function create() {
  const rights = /** @type {import("./session.js").Rights} */ (session.rights);
  const mayCreate = rights.control && rights.create.length > 0;
  let sort = "name";
  let isShown = false;
  let timer = 0;
  /** @type {{id: string, update: (adapter: Adapter) => void} | undefined} the adapter whose details are open */
  let details;
  /** @type {Element | null} what had the focus before the panel was opened */
  let before = null;

  const search = element("input", { type: "search", id: "adapter-search", placeholder: "Name, target or tier", oninput: change });
  const tally = element("span", { role: "status", class: "muted" });
  const chosen = element("div", { class: "row" });
  const panel = element("section", { class: "card stack adapter-panel", hidden: true });
  panel.addEventListener("keydown", (event) => event.key === "Escape" && close());
  const table = new AdapterTable({
    columns: Object.keys(COLUMNS).filter((name) => name !== "requests" || rights.control),
    onOpen: showDetails,
    onSort: (column) => {
      sort = sort === column ? `-${column}` : column;
      change();
    },
    onChoose: drawChosen,
    isRemoved: (id) => removal.has(id),
  });
  const view = element(
    "section",
    { class: "stack adapters" },
    element(
      "div",
      { class: "row spread" },
      element("div", { class: "row" }, element("h1", {}, "Adapters"), tally),
      element(
        "div",
        { class: "row" },
        element("label", { for: "adapter-search" }, "Search"),
        search,
        mayCreate && button("Upload…", () => open("Upload an adapter", adapterUpload(published)), { class: "primary" }),
      ),
    ),
    chosen,
    element("div", { class: "adapter-body" }, table.element, panel),
  );

  function change() {
    address.write("adapters", { search: search.value, sort });
    draw();
  }

  function draw() {
    const adapters = /** @type {Adapter[]} */ (session.adapters);
    const ids = new Set(adapters.map(({ id }) => id));
    for (const id of table.chosen) if (!ids.has(id)) table.chosen.delete(id);
    const shown = select(adapters, search.value, sort);
    table.show(shown, sort);
    const all = `${count(adapters.length)} ${adapters.length === 1 ? "adapter" : "adapters"}`;
    const text = shown.length === adapters.length ? all : `${count(shown.length)} of ${all}`;
    if (tally.textContent !== text) replace(tally, text);
    drawChosen();
    const open = details && adapters.find(({ id }) => id === details?.id);
    if (open) details?.update(open);
    else if (details) close();
  }

  let drawn = "";
  function drawChosen() {
    const ids = [...table.chosen];
    if (JSON.stringify(ids) === drawn) return;
    drawn = JSON.stringify(ids);
    replace(
      chosen,
      ids.length > 0 && element("span", {}, `${count(ids.length)} chosen:`),
      ids.length > 0 && answersLink(ids, "Compare answers"),
      ids.length === 2 && button("Compare weights", () => compare(ids[0], ids[1])),
      ids.length > 1 && mayCreate && button("Blend…", () => open("Save a blend", adapterBlend(ids, published))),
      ids.length > 0 && button("Clear", clear, { class: "quiet" }),
    );
  }

  function clear() {
    table.chosen.clear();
    draw();
    table.element.querySelector("input")?.focus();
  }

  /** @param {Adapter} adapter */
  function showDetails(adapter) {
    const next = adapterDetails(adapter, compare);
    open(adapter.id, next.element);
    details = { id: adapter.id, update: next.update };
  }

  /**
   * @param {string} one
   * @param {string} other
   */
  function compare(one, other) {
    open("Two adapters compared", adapterComparison(one, other));
  }

  /**
   * @param {string} title
   * @param {HTMLElement} content
   */
  function open(title, content) {
    if (!panel.contains(document.activeElement)) before = document.activeElement;
    details = undefined;
    const heading = element("h2", { class: "text", tabIndex: -1, id: "adapter-panel" }, title);
    const head = element("div", { class: "row spread" }, heading, button("Close", close, { class: "quiet" }));
    panel.setAttribute("aria-labelledby", heading.id);
    replace(panel, head, content);
    panel.hidden = false;
    heading.focus({ preventScroll: true });
    panel.scrollIntoView({ block: "nearest" });
  }

  function close() {
    details = undefined;
    const hadFocus = panel.contains(document.activeElement);
    panel.hidden = true;
    replace(panel);
    const target = before?.isConnected ? before : search;
    if (hadFocus && target instanceof HTMLElement) target.focus();
  }

  /** @param {import("./session.js").Model} model a version */
  async function published(model) {
    const isNewest = session.adapters.some(({ root }) => root === model.id);
    try {
      await session.refreshModels();
      const name = model.id.split("@")[0];
      const adapter = /** @type {Adapter | undefined} */ (session.adapters.find(({ id }) => id === name));
      if (adapter) showDetails(adapter);
      else close();
    } finally {
      notify(isNewest ? `${model.id} has this content already: nothing new was published.` : `${model.id} was published.`);
    }
  }

  /** Look at the store from time to time: other clients change it, and requests load adapters. */
  async function look() {
    clearTimeout(timer);
    const start = performance.now();
    await session.refreshModels().catch(() => {}); // the page says that the server is gone
    clearTimeout(timer);
    if (isShown) timer = setTimeout(look, Math.max(PERIOD, SHARE * (performance.now() - start)));
  }

  const drawIfShown = () => isShown && draw();
  session.addEventListener("models", drawIfShown);
  removal.addEventListener("change", drawIfShown);
  history.addEventListener("sample", () => isShown && (sort.endsWith("requests") ? draw() : table.draw()));
  return {
    element: view,
    show(state) {
      isShown = true;
      if (state) {
        search.value = typeof state.search === "string" ? state.search : "";
        sort = table.columns.includes(String(state.sort).replace("-", "")) ? state.sort : "name";
      }
      draw();
      look();
    },
    hide() {
      isShown = false;
      clearTimeout(timer);
    },
  };
}
