/** Two adapters compared: how large their updates are and how alike, module by module. */

import { get } from "./api.js";
import { element, replace } from "./dom.js";
import { count, number } from "./format.js";
import { heatMap } from "./heat_map.js";
import { refusal } from "./refusal.js";

/** @typedef {{path: string, norm_a: number, norm_b: number, distance: number | null, similarity: number | null}} Module */
/** @typedef {"similarity" | "norm_a" | "norm_b" | "distance"} Quantity */

const LAYER = /^(?:(.*?)\.)?(\d+)\.(.+)$/;

/**
 * Return the comparison of two adapters, which the user can change.
 * @param {string} one
 * @param {string} other
 */
export function adapterComparison(one, other) {
  const a = element("input", { id: "compare-a", value: one, required: true });
  const b = element("input", { id: "compare-b", value: other, required: true });
  const quantity = element("select", { id: "compare-quantity", onchange: draw });
  const scale = element("span", { class: "muted" });
  const summary = element("p", { role: "status" });
  const map = heatMap("Modules by layer");
  const rows = element("tbody");
  const heads = element("tr");
  const results = element(
    "div",
    { class: "stack", hidden: true },
    element("div", { class: "row" }, element("label", { for: "compare-quantity" }, "Colour"), quantity, scale),
    map.element,
    element(
      "details",
      {},
      element("summary", {}, "As a table"),
      element("div", { class: "scroll comparison-table", tabIndex: 0, role: "region", "aria-label": "Modules" }, element("table", {}, element("thead", {}, heads), rows)),
    ),
  );
  const form = element(
    "form",
    { class: "row", onsubmit: load },
    element("label", { for: "compare-a" }, "A"),
    a,
    element("label", { for: "compare-b" }, "B"),
    b,
    element("button", {}, "Compare weights"),
  );
  /** @type {Module[]} */
  let modules = [];

  /** @param {Event} [event] */
  async function load(event) {
    event?.preventDefault();
    replace(summary, "Comparing…");
    results.hidden = true;
    try {
      const query = new URLSearchParams({ a: a.value, b: b.value });
      const comparison = await get(`v1/adapters/compare?${query}`);
      modules = comparison.modules;
      const both = modules.filter(({ similarity }) => similarity !== null).length;
      replace(
        summary,
        `${comparison.a} and ${comparison.b}: ${count(modules.length)} modules, ${count(both)} of them changed by both. `,
        `Distance of all together, |ΔB − ΔA| / |ΔA|: ${number(comparison.distance)}.`,
      );
      const names = { similarity: "Similarity (cosine)", norm_a: `Norm of ${comparison.a}`, norm_b: `Norm of ${comparison.b}`, distance: "Distance" };
      const chosen = quantity.value;
      replace(quantity, ...Object.entries(names).map(([value, text]) => element("option", { value }, text)));
      quantity.value = chosen || "similarity";
      replace(heads, ...["Module", ...Object.values(names)].map((text) => element("th", { scope: "col" }, text)));
      replace(rows, ...modules.map(moduleRow));
      results.hidden = false;
      draw();
    } catch (error) {
      replace(summary, refusal(error));
    }
  }

  function draw() {
    const key = /** @type {Quantity} */ (quantity.value);
    const places = modules.map(({ path }) => placeOf(path));
    const kinds = [...new Set(places.map(({ kind }) => kind))];
    const layers = [...new Set(places.map(({ layer }) => layer))].sort((x, y) => x - y);
    const cells = new Map(modules.map((module, index) => [`${layers.indexOf(places[index].layer)} ${places[index].kind}`, module]));
    const most = Math.max(...modules.map((module) => Math.abs(module[key] ?? 0))) || 1;
    replace(scale, key === "similarity" ? "full colour: 1, or −1 in red" : `full colour: ${number(most)}`);
    /**
     * @param {number} row
     * @param {number} column
     */
    const at = (row, column) => cells.get(`${column} ${kinds[row]}`);
    map.set({
      rows: kinds,
      columns: layers.map((layer) => (Number.isFinite(layer) ? String(layer) : "–")),
      share(row, column) {
        const value = at(row, column)?.[key] ?? null;
        return value === null || key === "similarity" ? value : value / most;
      },
      text(row, column) {
        const module = at(row, column);
        return module ? describe(module) : `${kinds[row]}, layer ${layers[column]}: neither changes it`;
      },
    });
  }
  if (one && other) load();
  return element("div", { class: "stack" }, form, summary, results);
}

/**
 * Return a module's layer, infinite if it is in none, and what it is there.
 * @param {string} path
 */
function placeOf(path) {
  const [, before = "", layer, kind] = LAYER.exec(path) ?? [];
  if (layer === undefined) return { layer: Infinity, kind: path };
  const stack = before.replace(/^(base_)?model\.?/, "").replace(/^layers$/, "");
  return { layer: Number(layer), kind: stack ? `${stack}.${kind}` : kind };
}

/** @param {Module} module */
function describe({ path, norm_a, norm_b, distance, similarity }) {
  const texts = [`norm A ${text(norm_a)}`, `norm B ${text(norm_b)}`, `distance ${text(distance)}`, `similarity ${text(similarity)}`];
  return `${path}: ${texts.join(", ")}`;
}

/** @param {Module} module */
function moduleRow({ path, norm_a, norm_b, distance, similarity }) {
  const values = [similarity, norm_a, norm_b, distance];
  const cells = values.map((value) => element("td", { class: "number" }, text(value)));
  return element("tr", {}, element("th", { scope: "row" }, path), ...cells);
}

/** @param {number | null} value */
function text(value) {
  return value === null ? "–" : number(value);
}
