/** The table of adapters. Of ten thousand rows, only those in sight are in the document. */

import { COLUMNS } from "./adapter_columns.js";
import { button, element } from "./dom.js";

/** @typedef {import("./adapter_columns.js").Adapter} Adapter */

const HEIGHT = 36; // pixels of a row, as in adapters.css
const BEYOND = 6; // rows above and below those in sight, so that scrolling does not outrun them
const STEPS = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };

export class AdapterTable {
  /**
   * @param {object} options
   * @param {string[]} options.columns names of the columns
   * @param {(adapter: Adapter) => void} options.onOpen
   * @param {(column: string) => void} options.onSort
   * @param {() => void} options.onChoose called when `chosen` has changed
   * @param {(id: string) => boolean} options.isRemoved whether a row is struck through
   */
  constructor({ columns, onOpen, onSort, onChoose, isRemoved }) {
    this.columns = columns;
    this.onOpen = onOpen;
    this.onChoose = onChoose;
    this.isRemoved = isRemoved;
    /** The ids of the adapters that are ticked. @type {Set<string>} */
    this.chosen = new Set();
    /** @type {Adapter[]} */
    this.adapters = [];
    /** The row that the Tab key reaches. */
    this.current = "";
    /** The rows in the document, by id. @type {Map<string, Row>} */
    this.rows = new Map();
    this.headers = new Map(columns.map((name) => [name, header(name, () => onSort(name))]));
    this.head = element(
      "div",
      { role: "row", class: "adapter-row", "aria-rowindex": 1 },
      element("div", { role: "columnheader" }, element("span", { class: "hidden" }, "Chosen")),
      ...this.headers.values(),
    );
    this.body = element("div", { role: "rowgroup", class: "adapter-rows" });
    this.table = element(
      "div",
      { role: "table", "aria-label": "Adapters", "aria-description": "The arrow keys move between the rows." },
      element("div", { role: "rowgroup", class: "adapter-head" }, this.head),
      this.body,
    );
    this.element = element("div", { class: `scroll adapter-table columns-${columns.length}` }, this.table);
    let isPlanned = false;
    const plan = () => {
      if (isPlanned) return;
      isPlanned = true;
      requestAnimationFrame(() => {
        isPlanned = false;
        this.draw();
      });
    };
    this.element.addEventListener("scroll", plan, { passive: true });
    new ResizeObserver(plan).observe(this.element);
    this.body.addEventListener("keydown", (event) => this.#move(event));
    this.body.addEventListener("focusin", (event) => this.#setCurrent(/** @type {HTMLElement} */ (event.target)));
  }

  /**
   * Show these adapters.
   * @param {Adapter[]} adapters
   * @param {string} sort a column, with "-" before it if it descends
   */
  show(adapters, sort) {
    this.adapters = adapters;
    this.table.setAttribute("aria-rowcount", String(adapters.length + 1));
    this.body.style.height = `${adapters.length * HEIGHT}px`;
    for (const [name, cell] of this.headers) {
      if (name === sort.replace("-", "")) cell.setAttribute("aria-sort", sort.startsWith("-") ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    }
    this.draw();
  }

  /** Bring the rows in sight up to date. */
  draw() {
    const focused = document.activeElement;
    const [first, end] = this.#inSight();
    const indices = new Set(Array.from({ length: end - first }, (_, offset) => first + offset));
    let current = this.adapters.findIndex(({ id }) => id === this.current);
    if (!indices.has(current) && (current < 0 || !this.body.contains(focused))) {
      current = Math.min(Math.ceil(this.element.scrollTop / HEIGHT), this.adapters.length - 1); // the first one in sight
    }
    if (current >= 0) indices.add(current); // what has the focus stays
    this.current = this.adapters[current]?.id ?? "";
    const rows = [...indices].sort((one, other) => one - other).map((index) => ({ index, adapter: this.adapters[index] }));
    const ids = new Set(rows.map(({ adapter }) => adapter.id));
    for (const [id, row] of this.rows) {
      if (ids.has(id)) continue;
      row.element.remove();
      this.rows.delete(id);
    }
    rows.forEach(({ index, adapter }, position) => {
      const row = this.rows.get(adapter.id) ?? new Row(this);
      this.rows.set(adapter.id, row);
      row.fill(adapter, index);
      if (this.body.children[position] !== row.element) this.body.insertBefore(row.element, this.body.children[position] ?? null);
    });
    if (focused instanceof HTMLElement && focused !== document.activeElement && this.body.contains(focused)) focused.focus();
  }

  /** @returns {[number, number]} the rows in sight, and some more: the first, and the one after the last */
  #inSight() {
    const top = this.element.scrollTop - this.head.offsetHeight;
    const first = Math.floor(top / HEIGHT) - BEYOND;
    const end = Math.ceil((top + this.element.clientHeight) / HEIGHT) + BEYOND;
    return [Math.min(Math.max(0, first), this.adapters.length), Math.min(this.adapters.length, end)];
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const step = STEPS[/** @type {keyof typeof STEPS} */ (event.key)];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const isBox = event.target instanceof HTMLInputElement;
    const at = this.adapters.findIndex(({ id }) => id === this.current);
    const index = Math.max(0, Math.min(this.adapters.length - 1, at + step));
    this.current = this.adapters[index].id;
    const top = index * HEIGHT;
    const room = this.element.clientHeight - this.head.offsetHeight - HEIGHT;
    this.element.scrollTop = Math.min(top, Math.max(this.element.scrollTop, top - room));
    this.draw();
    const row = /** @type {Row} */ (this.rows.get(this.current));
    (isBox ? row.box : row.name).focus({ preventScroll: true });
  }

  /** @param {HTMLElement} target */
  #setCurrent(target) {
    const id = [...this.rows].find(([, row]) => row.element.contains(target))?.[0];
    if (!id || id === this.current) return;
    const before = this.rows.get(this.current);
    this.current = id;
    before?.reach(false);
    this.rows.get(id)?.reach(true);
  }
}

/** A row in the document. */
class Row {
  /** @param {AdapterTable} table */
  constructor(table) {
    this.table = table;
    /** @type {Adapter | undefined} */
    this.adapter = undefined;
    this.box = element("input", { type: "checkbox", onchange: () => this.#choose() });
    this.name = button("", () => this.adapter && table.onOpen(this.adapter), { class: "quiet adapter-name" });
    this.badge = element("span", { class: "badge" });
    this.cells = new Map(table.columns.map((name) => [name, cell(name)]));
    this.cells.get("name")?.append(this.name);
    this.cells.get("tier")?.append(this.badge);
    const box = element("div", { role: "cell" }, this.box);
    this.element = element("div", { role: "row", class: "adapter-row" }, box, ...this.cells.values());
  }

  /**
   * @param {Adapter} adapter
   * @param {number} index
   */
  fill(adapter, index) {
    const { id } = adapter;
    const isRemoved = this.table.isRemoved(id);
    this.adapter = adapter;
    this.element.setAttribute("aria-rowindex", String(index + 2));
    this.element.style.transform = `translateY(${index * HEIGHT}px)`;
    this.element.classList.toggle("removed", isRemoved);
    this.box.setAttribute("aria-label", `Choose ${id}`);
    this.box.checked = this.table.chosen.has(id);
    for (const [name, cell] of this.cells) {
      const text = COLUMNS[name].text(adapter);
      write(name === "name" ? this.name : name === "tier" ? this.badge : cell, text);
      if (name === "name" || name === "targets") cell.title = text;
    }
    if (isRemoved) write(this.badge, "Being removed");
    this.badge.className = `badge tier-${adapter.adapter.tier}`;
    this.reach(id === this.table.current);
  }

  /** @param {boolean} isCurrent whether the Tab key reaches it */
  reach(isCurrent) {
    this.box.tabIndex = this.name.tabIndex = isCurrent ? 0 : -1;
  }

  #choose() {
    if (!this.adapter) return;
    if (this.box.checked) this.table.chosen.add(this.adapter.id);
    else this.table.chosen.delete(this.adapter.id);
    this.table.onChoose();
  }
}

/**
 * @param {string} name
 * @param {() => void} onclick
 */
function header(name, onclick) {
  const { title, number } = COLUMNS[name];
  return element("div", { role: "columnheader", class: number ? "number" : null }, button(title, onclick, { class: "quiet" }));
}

/** @param {string} name */
function cell(name) {
  return element("div", { role: "cell", class: COLUMNS[name].number ? "number" : null });
}

/**
 * @param {Element} place
 * @param {string} text
 */
function write(place, text) {
  if (place.textContent !== text) place.textContent = text;
}
