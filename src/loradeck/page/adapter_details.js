/** One adapter: what it is, its versions, and what can be done with them. */

import * as address from "./address.js";
import { COLUMNS, TIERS } from "./adapter_columns.js";
import { get, post } from "./api.js";
import { button, element, replace } from "./dom.js";
import { count, number, size } from "./format.js";
import { notify } from "./notice.js";
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
  const facts = element("dl", { class: "facts" });
  const actions = element("div", { class: "row" });
  const problems = element("div");
  const rows = element("tbody");
  /** @type {Adapter[]} */
  let versions = [];
  let shown = ""; // what the rows were drawn from

  /** @param {Adapter} next */
  function update(next) {
    adapter = next;
    const { id, created, adapter: facet } = adapter;
    /** @type {[string, string][]} */
    const entries = [
      ["Newest version", adapter.root],
      ["Published", new Date(created * 1000).toLocaleString()],
      ["Rank", `${count(facet.rank)}, alpha ${number(facet.alpha)}`],
      ["Size", size(facet.bytes)],
      ["Targets", facet.targets.join(", ")],
      ["Tier", TIERS[facet.tier] + (facet.pinned ? ", in use" : "")],
      ["Last used", COLUMNS.used.text(adapter)],
    ];
    if (facet.sha256) entries.push(["sha256", facet.sha256]);
    replace(facts, ...entries.flatMap(([name, text]) => [element("dt", {}, name), element("dd", { class: "text" }, text)]));
    const isRemoved = removal.has(id);
    const { control } = /** @type {import("./session.js").Rights} */ (session.rights);
    replace(
      actions,
      answersLink([id], "Open in Compare"),
      control && facet.tier !== "device" && button("Load", (event) => act(event, load), { disabled: isRemoved }),
      control && facet.loaded && button("Unload", (event) => act(event, unload)),
      control && button("Remove", () => removal.start(id, allVersions()), { class: "danger", disabled: isRemoved }),
    );
    drawVersions();
    const state = JSON.stringify(adapter);
    if (state !== shown) listVersions(state);
  }

  /** @param {string} state */
  async function listVersions(state) {
    shown = state;
    try {
      versions = (await get(`v1/adapters/${encodeURIComponent(adapter.id)}/versions`)).data;
    } catch (error) {
      replace(problems, refusal(error));
    }
    drawVersions();
  }

  function drawVersions() {
    const focused = document.activeElement?.getAttribute("aria-label");
    replace(rows, ...versions.map((version, index) => versionRow(version, index)));
    if (focused) [...rows.querySelectorAll("button")].find((each) => each.ariaLabel === focused)?.focus();
  }

  /**
   * @param {Adapter} version
   * @param {number} index 0 is the newest
   */
  function versionRow({ id, created, adapter: facet }, index) {
    const control = session.rights?.control;
    const isRemoved = removal.has(id);
    /**
     * @param {string} label
     * @param {(event: Event) => void} onclick
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
        { class: "row" },
        answersLink([id], "Compare", `Compare: ${id}`),
        index > 0 && action("Weights", () => onCompare(id, versions[0].id)),
        control && index > 0 && action("Publish again", (event) => act(event, () => publish(id))),
        control && action("Remove", () => removal.start(id, id), "quiet danger"),
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

  /**
   * @param {Event} event of the button
   * @param {() => Promise<string>} action returns what was done
   */
  async function act(event, action) {
    const pressed = /** @type {HTMLButtonElement} */ (event.currentTarget);
    pressed.disabled = true;
    replace(problems);
    try {
      notify(await action());
      await session.refreshModels();
    } catch (error) {
      replace(problems, refusal(error));
    }
    pressed.disabled = false;
  }

  const titles = ["Version", "Rank", "Size", "Tier", "Published", "Actions"];
  const head = titles.map((title, index) => element("th", { scope: "col", class: index < 3 ? "number" : null }, title));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), rows);
  const list = element("div", { class: "scroll" }, table);
  update(adapter);
  return { element: element("div", { class: "stack" }, facts, actions, problems, element("h3", {}, "Versions"), list), update };
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
