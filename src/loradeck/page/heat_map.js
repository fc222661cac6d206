/** A heat map: one cell for each row and column, read out where the pointer or the keyboard is. */

import { element, replace, svg } from "./dom.js";

const CELL = 16; // pixels
const STEP = CELL + 2;
const LETTER = 7; // width, about
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

/**
 * @typedef {object} Cells
 * @property {string[]} rows
 * @property {string[]} columns
 * @property {(row: number, column: number) => number | null} share how strong a cell's colour is, from -1 to 1; null: it
 *   is empty
 * @property {(row: number, column: number) => string} text what is read out
 */

/**
 * Return a heat map.
 * @param {string} label
 * @returns {{element: HTMLElement, set: (cells: Cells) => void}}
 */
export function heatMap(label) {
  const readout = element("output", { class: "heat-text" });
  const place = element("div", { class: "scroll" });
  /** @type {Cells} */
  let cells = { rows: [], columns: [], share: () => null, text: () => "" };
  let cursor = [0, 0];
  /** @type {SVGElement | undefined} */
  let mark;

  /** @param {Cells} next */
  function set(next) {
    cells = next;
    cursor = [0, 0];
    const left = LETTER * Math.max(0, ...cells.rows.map((row) => row.length)) + 8;
    const [width, height] = [left + cells.columns.length * STEP, (cells.rows.length + 1) * STEP];
    mark = svg("rect", { class: "heat-mark", width: CELL, height: CELL, visibility: "hidden" });
    const map = svg(
      "svg",
      { role: "img", tabindex: 0, "aria-label": `${label}; the arrow keys move in it`, class: "heat-map", width, height, viewBox: `0 0 ${width} ${height}` },
      ...cells.rows.map((row, index) => svg("text", { x: left - 8, y: (index + 2) * STEP - 6, "text-anchor": "end" }, row)),
      ...cells.columns.map((column, index) =>
        index % 2 === 0 && svg("text", { x: left + index * STEP + CELL / 2, y: CELL - 3, "text-anchor": "middle" }, column),
      ),
      ...cells.rows.flatMap((_, row) => cells.columns.map((__, column) => cell(left, row, column))),
      mark,
    );
    map.addEventListener("keydown", move);
    map.addEventListener("focus", () => point(cursor[0], cursor[1], left));
    map.addEventListener("pointermove", (event) => {
      const box = map.getBoundingClientRect();
      const [row, column] = [Math.floor((event.clientY - box.top) / STEP) - 1, Math.floor((event.clientX - box.left - left) / STEP)];
      if (row in cells.rows && column in cells.columns) point(row, column, left);
    });
    replace(place, map);
    replace(readout);

    /** @param {KeyboardEvent} event */
    function move(event) {
      const [down, right] = MOVES[/** @type {keyof typeof MOVES} */ (event.key)] ?? [];
      if (down === undefined) return;
      event.preventDefault();
      const row = Math.max(0, Math.min(cells.rows.length - 1, cursor[0] + down));
      point(row, Math.max(0, Math.min(cells.columns.length - 1, cursor[1] + right)), left);
      mark?.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  }

  /**
   * @param {number} row
   * @param {number} column
   * @param {number} left
   */
  function point(row, column, left) {
    if (!cells.rows.length) return;
    cursor = [row, column];
    mark?.setAttribute("x", String(left + column * STEP));
    mark?.setAttribute("y", String((row + 1) * STEP));
    mark?.setAttribute("visibility", "visible");
    replace(readout, cells.text(row, column));
  }

  /**
   * @param {number} left
   * @param {number} row
   * @param {number} column
   */
  function cell(left, row, column) {
    const share = cells.share(row, column);
    const kind = share === null ? "empty" : share < 0 ? "negative" : "positive";
    const opacity = share === null ? null : Math.min(1, Math.abs(share)).toFixed(3);
    const [x, y] = [left + column * STEP, (row + 1) * STEP];
    return svg("rect", { class: `heat-${kind}`, x, y, width: CELL, height: CELL, "fill-opacity": opacity });
  }
  return { element: element("div", { class: "stack" }, place, readout), set };
}
