/** One adapter: what it is, its versions, and what can be done with them. */

import * as address from "./address.js";
import { TIERS } from "./adapter_columns.js";
import { get, post } from "./api.js";
import { button, element, replace } from "./dom.js";
import { count, number, size } from "./format.js";
import { notify } from "./notice.js";
import { matches } from "./pattern.js";
import { refusal } from "./refusal.js";
import { removal } from "./removal.js";
import { session } from "./session.js";

/** @typedef {import("./adapter_columns.js").Adapter} Adapter */

/**
 * Return an adapter's details, and a function that brings them up to date.
 * @param {Adapter} adapter
 * @param {(one: string, other: string) => void} onCompare called to compare the weights of two versions
 * @returns {{element: HTMLElement, update: (adapter: Adapter) => void}}
 */
export function adapterDetails(adapter, onCompare) {
  const { control, create } = /** @type {import("./session.js").Rights} */ (session.rights);
  const mayChange = control && matches(adapter.id, create);
  const facts = element("dl", { class: "facts" });
  const actions = element("div", { class: "row" });
  const problems = element("div");
  const rows = element("tbody");
  /** @type {Adapter[]} */
  let versions = [];
  let shown = ""; // what the details were drawn from
  let listed = ""; // what the versions were asked for
  let isBusy = false;

  /** @param {Adapter} next */
  function update(next) {
    adapter = next;
    const removed = [adapter, ...versions].filter(({ id }) => removal.has(id)).map(({ id }) => id);
    const state = JSON.stringify([adapter, removed]);
    if (state !== listed) listVersions(state);
    const drawn = JSON.stringify([state, versions]);
    if (drawn === shown) return;
    shown = drawn;
    keepFocus(content, () => {
      drawFacts();
      drawActions();
      replace(rows, ...versions.map(versionRow));
    });
  }

  function drawFacts() {
    const { created, adapter: facet } = adapter;
    /** @type {[string, string][]} */
    const entries = [
      ["Newest version", adapter.root],
      ["Published", new Date(created * 1000).toLocaleString()],
      ["Rank", `${count(facet.rank)}, alpha ${number(facet.alpha)}`],
      ["Size", size(facet.bytes)],
      ["Targets", facet.targets.join(", ")],
      ["Tier", TIERS[facet.tier] + (facet.pinned ? ", in use" : "")],
    ];
    if (facet.sha256) entries.push(["sha256", facet.sha256]);
    replace(facts, ...entries.flatMap(([name, text]) => [element("dt", {}, name), element("dd", { class: "text" }, text)]));
  }

  function drawActions() {
    const { id, adapter: facet } = adapter;
    const isRemoved = removal.has(id);
    replace(
      actions,
      answersLink([id], "Open in Compare"),
      control && facet.tier !== "device" && button("Load", () => act(load), { disabled: isRemoved }),
      control && facet.loaded && button("Unload", () => act(unload)),
      mayChange && button("Remove", () => removal.start(id, allVersions()), { class: "danger", disabled: isRemoved }),
    );
  }

  /** @param {string} state */
  async function listVersions(state) {
    listed = state;
    try {
      const { data } = await get(`v1/adapters/${encodeURIComponent(adapter.id)}/versions`);
      if (state !== listed) return; // a newer list is on its way
      versions = data;
      update(adapter);
    } catch (error) {
      replace(problems, refusal(error));
    }
  }

  /**
   * @param {Adapter} version
   * @param {number} index 0 is the newest
   */
  function versionRow({ id, created, adapter: facet }, index) {
    const isRemoved = removal.has(id);
    /**
     * @param {string} label
     * @param {() => void} onclick
     * @param {string} kind
     */
    const action = (label, onclick, kind = "quiet") =>
      button(label, onclick, { class: kind, "aria-label": `${label}: ${id}`, disabled: isRemoved });
    return element(
      "tr",
      { class: isRemoved ? "removed" : null },
      element("td", { class: "number" }, count(facet.version)),
      element("td", { class: "number" }, count(facet.rank)),
      element("td", { class: "number" }, size(facet.bytes)),
      element("td", {}, element("span", { class: `badge tier-${facet.tier}` }, isRemoved ? "Being removed" : TIERS[facet.tier])),
      element("td", {}, new Date(created * 1000).toLocaleDateString()),
      element(
        "td",
        {},
        element(
          "div",
          { class: "row" },
          answersLink([id], "Compare", `Compare: ${id}`),
          index > 0 && action("Compare weights", () => onCompare(id, versions[0].id)),
          mayChange && index > 0 && action("Publish again", () => act(() => publish(id))),
          mayChange && action("Remove", () => removal.start(id, id), "quiet danger"),
        ),
      ),
    );
  }

  function allVersions() {
    return versions.length > 1 ? `${adapter.id}, all ${versions.length} versions,` : adapter.id;
  }

  async function load() {
    await post("v1/load_lora_adapter", { lora_name: adapter.id });
    return `${adapter.root} is loaded.`;
  }

  async function unload() {
    await post("v1/unload_lora_adapter", { lora_name: adapter.id });
    return `${adapter.id} leaves memory; it is loaded again when it is asked.`;
  }

  /** @param {string} version */
  async function publish(version) {
    await post("v1/load_lora_adapter", { lora_name: adapter.id, lora_path: version, load_inplace: true });
    return `${version} is the newest version again.`;
  }

  /** @param {() => Promise<string>} action returns what was done */
  async function act(action) {
    if (isBusy) return;
    isBusy = true;
    content.ariaBusy = "true";
    replace(problems);
    try {
      notify(await action());
      await session.refreshModels();
    } catch (error) {
      replace(problems, refusal(error));
    }
    isBusy = false;
    content.ariaBusy = null;
  }

  const titles = ["Version", "Rank", "Size", "Tier", "Published", "Actions"];
  const head = titles.map((title, index) => element("th", { scope: "col", class: index < 3 ? "number" : null }, title));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), rows);
  const list = element("div", { class: "scroll" }, table);
  const content = element("div", { class: "stack" }, facts, actions, problems, element("h3", {}, "Versions"), list);
  update(adapter);
  return { element: content, update };
}

/**
 * Draw a place anew. If the focus is in it, it goes to what then has the same name, or else to the first button.
 * @param {HTMLElement} place
 * @param {() => void} draw
 */
function keepFocus(place, draw) {
  /** @param {Element} each */
  const nameOf = (each) => each.ariaLabel ?? each.textContent;
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  draw();
  if (!focused || focused.isConnected) return;
  const targets = [.../** @type {NodeListOf<HTMLElement>} */ (place.querySelectorAll("a, button:enabled"))];
  (targets.find((each) => nameOf(each) === nameOf(focused)) ?? targets[0])?.focus();
}

/**
 * Return a link that opens models in the view Compare, next to the base; nothing on a base that does not generate.
 * @param {string[]} ids
 * @param {string} text
 * @param {string} [label]
 */
export function answersLink(ids, text, label) {
  if (session.rights?.task !== "generate") return null;
  const columns = [session.base, ...ids].map((model) => ({ model }));
  return element("a", { href: address.link("compare", { columns }), "aria-label": label }, text);
}
