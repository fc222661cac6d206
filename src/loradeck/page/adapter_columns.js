/** The columns of the table of adapters, and what a search and an order make of it. */

import { ago, count, size } from "./format.js";
import { history } from "./metrics.js";

/** @typedef {import("./session.js").Model & {adapter: NonNullable<import("./session.js").Model["adapter"]>}} Adapter */

/**
 * @typedef {object} Column
 * @property {string} title
 * @property {(adapter: Adapter) => string | number} value by which it is sorted
 * @property {(adapter: Adapter) => string} text
 * @property {boolean} [number] whether it is aligned as numbers are
 */

export const TIERS = { device: "On the device", memory: "In memory", disk: "On disk" };
const order = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

/** @type {Record<string, Column>} */
export const COLUMNS = {
  name: { title: "Name", value: ({ id }) => id, text: ({ id }) => id },
  version: {
    title: "Versions",
    value: ({ adapter }) => adapter.version,
    text: ({ adapter }) => (adapter.version ? count(adapter.version) : "–"), // not published: a folder without versions
    number: true,
  },
  rank: { title: "Rank", value: ({ adapter }) => adapter.rank, text: ({ adapter }) => count(adapter.rank), number: true },
  size: { title: "Size", value: ({ adapter }) => adapter.bytes, text: ({ adapter }) => size(adapter.bytes), number: true },
  targets: {
    title: "Targets",
    value: ({ adapter }) => adapter.targets.join(", "),
    text: ({ adapter }) => adapter.targets.join(", "),
  },
  tier: {
    title: "Tier",
    value: ({ adapter }) => Object.keys(TIERS).indexOf(adapter.tier),
    text: ({ adapter }) => TIERS[adapter.tier],
  },
  requests: { title: "Requests", value: ({ id }) => requests(id) ?? -1, text: ({ id }) => countOf(requests(id)), number: true },
  used: {
    title: "Last used",
    value: ({ adapter }) => adapter.last_used ?? 0,
    text: ({ adapter }) => (adapter.last_used ? ago(adapter.last_used) : "–"),
  },
};

/**
 * Return the adapters that have every word of a search, in an order.
 * @param {Adapter[]} adapters
 * @param {string} search
 * @param {string} sort a column, with "-" before it if it descends
 */
export function select(adapters, search, sort) {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const selected = adapters.filter((adapter) => {
    const text = `${adapter.id} ${COLUMNS.targets.text(adapter)} ${COLUMNS.tier.text(adapter)}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const { value } = COLUMNS[sort.replace("-", "")];
  const sign = sort.startsWith("-") ? -1 : 1;
  const keyed = selected.map((adapter) => ({ adapter, key: value(adapter) }));
  keyed.sort((one, other) => sign * compare(one.key, other.key) || order.compare(one.adapter.id, other.adapter.id));
  return keyed.map(({ adapter }) => adapter);
}

/**
 * @param {string | number} one
 * @param {string | number} other
 */
function compare(one, other) {
  return typeof one === "number" && typeof other === "number" ? one - other : order.compare(String(one), String(other));
}

/**
 * Return how many requests an adapter has had since the server started; undefined if only the busier ones are known.
 * @param {string} id
 */
function requests(id) {
  const value = history.value("loradeck_adapter_requests_total", { adapter: id });
  if (!Number.isNaN(value)) return value;
  const others = history.value("loradeck_adapter_requests_total", { adapter: "<other>" });
  return history.times.length && Number.isNaN(others) ? 0 : undefined;
}

/** @param {number | undefined} value */
function countOf(value) {
  return value === undefined ? "–" : count(value);
}
