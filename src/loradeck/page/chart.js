/** A line chart as SVG: a legend that shows and hides curves, a read-out at the pointer, zoom, a logarithmic scale. */

import { Axis } from "./axis.js";
import { curve, indexAt } from "./curve.js";
import { button, element, replace, svg } from "./dom.js";
import { number } from "./format.js";

const HEIGHT = 240;
const LEFT = 60; // room for the ticks' texts
const RIGHT = 12;
const TOP = 24;
const BOTTOM = 24;
const COLOURS = 8; // in chart.css
const DRAG = 5; // pixels; less is a click

/** @typedef {{name: string, points: import("./curve.js").Points, dashed?: boolean}} Series */

/**
 * @typedef {object} Options
 * @property {string} label what the chart shows
 * @property {string} x the name of the horizontal axis
 * @property {string} y
 * @property {boolean} [log] whether the vertical axis begins as logarithmic
 * @property {(value: number) => string} [formatX] how values are written, such as "3 s ago"; without it, as numbers after
 *   the name of the axis
 * @property {(value: number) => string} [formatY]
 */

/**
 * Return a chart: its element, and a function that replaces what it shows, as often as it changes.
 *
 * Drag to zoom, double click to see all; on the keyboard arrows move the read-out, + and - zoom, Escape shows all.
 * @param {Options} options
 * @returns {{element: HTMLElement, set: (series: Series[]) => void}}
 */
export function lineChart(options) {
  const chart = new LineChart(options);
  return { element: chart.element, set: (series) => chart.set(series) };
}

class LineChart {
  /** @type {Series[]} */
  #series = [];
  /** @type {Set<string>} the names of the curves that are not shown */
  #hidden = new Set();
  /** @type {[number, number] | null} */
  #zoom = null;
  /** @type {number | null} the x of the read-out */
  #cursor = null;
  /** @type {number | null} the pixel where dragging began */
  #drag = null;
  #frame = 0;
  #stale = true;
  #x = new Axis(0, 1, 0, 1);
  #y = new Axis(0, 1, 0, 1);
  /** @type {SVGElement[]} */
  #paths = [];
  /** @type {HTMLElement[]} */
  #values = [];

  /** @param {Options} options */
  constructor(options) {
    this.options = options;
    this.log = element("input", { type: "checkbox", checked: options.log ?? false, onchange: () => this.#redraw() });
    this.all = button("Show all", () => this.#zoomTo(null), { class: "quiet", hidden: true });
    this.at = element("span", { class: "muted" });
    this.legend = element("ul", { class: "legend", "aria-label": `Curves of ${options.label}` });
    this.grid = svg("g", { class: "grid" });
    this.curves = svg("g");
    this.marks = svg("g", { class: "marks" });
    this.area = svg("svg", { x: LEFT, y: TOP }, this.curves, this.marks);
    this.svg = svg("svg", { height: HEIGHT, "aria-hidden": "true" }, this.grid, this.area);
    this.plot = element(
      "div",
      {
        class: "plot",
        role: "slider",
        tabIndex: 0,
        "aria-label": `${options.label}: values by ${options.x}`,
        "aria-valuenow": 0,
        onpointerdown: (/** @type {PointerEvent} */ event) => this.#press(event),
        onpointermove: (/** @type {PointerEvent} */ event) => this.#move(event),
        onpointerup: (/** @type {PointerEvent} */ event) => this.#release(event),
        onpointercancel: () => this.#leave(),
        onpointerleave: () => this.#leave(),
        ondblclick: () => this.#zoomTo(null),
        onkeydown: (/** @type {KeyboardEvent} */ event) => this.#key(event),
      },
      this.svg,
    );
    this.element = element(
      "figure",
      { class: "chart" },
      element(
        "figcaption",
        { class: "row spread" },
        element("span", {}, element("strong", {}, options.label), " ", this.at),
        element("span", { class: "row" }, this.all, element("label", {}, this.log, "log scale")),
      ),
      this.plot,
      this.legend,
    );
    new ResizeObserver(() => this.#redraw()).observe(this.plot);
  }

  /** @param {Series[]} series */
  set(series) {
    const names = (/** @type {Series[]} */ all) => JSON.stringify(all.map(({ name, dashed }) => [name, dashed]));
    const changed = names(series) !== names(this.#series);
    this.#series = series;
    if (changed) this.#drawLegend();
    this.#redraw();
  }

  get #shown() {
    return this.#series.filter(({ name }) => !this.#hidden.has(name));
  }

  #drawLegend() {
    this.#paths = this.#series.map(({ dashed }, index) =>
      svg("path", { class: `curve series-${index % COLOURS}${dashed ? " dashed" : ""}` }),
    );
    replace(this.curves, ...this.#paths);
    this.#values = this.#series.map(() => element("span", { class: "number" }));
    const entries = this.#series.map(({ name, dashed }, index) => {
      const emphasise = (/** @type {boolean} */ on) => this.#paths[index]?.classList.toggle("strong", on);
      const sample = svg(
        "svg",
        { width: 22, height: 8, "aria-hidden": "true", class: `series-${index % COLOURS}${dashed ? " dashed" : ""}` },
        svg("path", { class: "curve", d: "M1 4H21" }),
      );
      const entry = element(
        "button",
        {
          type: "button",
          class: "quiet",
          title: "Show or hide this curve",
          "aria-pressed": !this.#hidden.has(name),
          onclick: () => {
            if (!this.#hidden.delete(name)) this.#hidden.add(name);
            entry.setAttribute("aria-pressed", String(!this.#hidden.has(name)));
            this.#redraw();
          },
          onpointerenter: () => emphasise(true),
          onpointerleave: () => emphasise(false),
          onfocus: () => emphasise(true),
          onblur: () => emphasise(false),
        },
        sample,
        element("span", {}, name),
        this.#values[index],
      );
      return element("li", {}, entry);
    });
    replace(this.legend, ...entries);
  }

  /** @param {boolean} [whole] whether more than the read-out has changed */
  #redraw(whole = true) {
    this.#stale ||= whole;
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#stale) this.#draw();
      else this.#drawMarks();
    });
  }

  #draw() {
    const width = this.plot.clientWidth;
    if (width <= LEFT + RIGHT) return; // not on the page
    this.#stale = false;
    const [right, bottom] = [width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
    for (const [name, value] of Object.entries({ width, viewBox: `0 0 ${width} ${HEIGHT}` })) {
      this.svg.setAttribute(name, String(value));
    }
    this.area.setAttribute("width", String(right));
    this.area.setAttribute("height", String(bottom));
    let [low, high] = this.#zoom ?? this.#extent();
    if (!(low < high)) [low, high] = low === high ? [low - 0.5, high + 0.5] : [0, 1];
    this.#x = new Axis(low, high, 0, right);
    this.#y = Axis.around(...this.#heights(low, high), bottom, 0, this.log.checked);
    this.all.hidden = this.#zoom === null;
    this.#drawGrid(right, bottom);
    this.#series.forEach(({ name, points }, index) => {
      this.#paths[index].setAttribute("d", this.#hidden.has(name) ? "" : curve(points, this.#x, this.#y));
    });
    this.#drawMarks();
  }

  /** @returns {[number, number]} */
  #extent() {
    const full = this.#shown.filter(({ points }) => points.length);
    return [
      Math.min(...full.map(({ points }) => points[0][0])),
      Math.max(...full.map(({ points }) => points[points.length - 1][0])),
    ];
  }

  /**
   * Return the lowest and the highest value between two x.
   * @param {number} from
   * @param {number} to
   * @returns {[number, number]}
   */
  #heights(from, to) {
    let [low, high] = [Infinity, -Infinity];
    for (const { points } of this.#shown) {
      for (let index = Math.max(0, indexAt(points, from)); index < points.length && points[index][0] <= to; index++) {
        const value = points[index][1];
        if (!Number.isFinite(value) || (this.log.checked && value <= 0)) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
    return [low, high];
  }

  /**
   * @param {number} right
   * @param {number} bottom
   */
  #drawGrid(right, bottom) {
    const { x, y, formatX, formatY } = this.options;
    const whole = this.#series.every(({ points }) => points.every(([at]) => Number.isInteger(at)));
    const down = this.#x.ticks(Math.max(2, Math.floor(right / 90)), whole ? 1 : 0).map(({ value, text }) => {
      const at = LEFT + this.#x.pixel(value);
      return [
        svg("path", { d: `M${at} ${TOP}v${bottom}` }),
        svg("text", { x: at, y: HEIGHT - 6, "text-anchor": "middle" }, formatX ? formatX(value) : text),
      ];
    });
    const across = this.#y.ticks(5).map(({ value, text }) => {
      const at = TOP + this.#y.pixel(value);
      return [
        svg("path", { d: `M${LEFT} ${at}h${right}` }),
        svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, formatY ? formatY(value) : text),
      ];
    });
    const names = [
      svg("text", { x: 4, y: 14 }, y),
      svg("text", { x: 4, y: HEIGHT - 6 }, x),
    ];
    if (!this.#shown.some(({ points }) => points.length)) {
      names.push(svg("text", { x: LEFT + right / 2, y: TOP + bottom / 2, "text-anchor": "middle" }, "nothing yet"));
    }
    replace(this.grid, ...down.flat(), ...across.flat(), ...names);
  }

  /** Draw the read-out, and what is dragged over. */
  #drawMarks() {
    const { x, formatX, formatY = number } = this.options;
    const [low, high] = this.#extent();
    const at = this.#cursor ?? high;
    const marks = this.#cursor === null ? [] : [svg("path", { d: `M${this.#x.pixel(at)} 0v${HEIGHT}` })];
    const texts = this.#series.map(({ name, points }, index) => {
      const point = this.#hidden.has(name) ? undefined : points[indexAt(points, at)];
      this.#values[index].textContent = point ? formatY(point[1]) : "";
      if (!point || !Number.isFinite(point[1]) || (this.#y.log && point[1] <= 0)) return "";
      if (this.#cursor !== null) {
        const place = { cx: this.#x.pixel(point[0]), cy: this.#y.pixel(point[1]), r: 3 };
        marks.push(svg("circle", { ...place, class: `series-${index % COLOURS}` }));
      }
      return `${name} ${formatY(point[1])}`;
    });
    if (this.#drag !== null && this.#cursor !== null) {
      const [from, to] = [this.#drag, this.#x.pixel(this.#cursor)].sort((a, b) => a - b);
      marks.push(svg("rect", { x: from, y: 0, width: to - from, height: HEIGHT }));
    }
    replace(this.marks, ...marks);
    const empty = !(low <= high);
    const where = empty ? "nothing yet" : formatX ? formatX(at) : `${x} ${number(at)}`;
    this.at.textContent = empty ? "" : where;
    this.plot.setAttribute("aria-valuemin", String(empty ? 0 : low));
    this.plot.setAttribute("aria-valuemax", String(empty ? 0 : high));
    this.plot.setAttribute("aria-valuenow", String(empty ? 0 : at));
    this.plot.setAttribute("aria-valuetext", [where, ...texts.filter(Boolean)].join(", "));
  }

  /** @param {[number, number] | null} range */
  #zoomTo(range) {
    this.#zoom = range;
    this.#redraw();
  }

  /**
   * Return the pixel of the plot's area where the pointer is.
   * @param {PointerEvent} event
   */
  #pixel(event) {
    const width = this.plot.clientWidth - LEFT - RIGHT;
    return Math.min(width, Math.max(0, event.clientX - this.plot.getBoundingClientRect().left - LEFT));
  }

  /** @param {PointerEvent} event */
  #press(event) {
    if (event.button !== 0) return;
    this.#drag = this.#pixel(event);
    this.plot.setPointerCapture(event.pointerId);
  }

  /** @param {PointerEvent} event */
  #move(event) {
    const x = this.#x.value(this.#pixel(event));
    this.#cursor = this.#drag === null ? this.#nearest(x) : x;
    this.#redraw(false);
  }

  /** @param {PointerEvent} event */
  #release(event) {
    const [from, to] = [this.#drag, this.#pixel(event)];
    this.#drag = null;
    if (from !== null && Math.abs(to - from) >= DRAG) {
      this.#zoomTo([this.#x.value(Math.min(from, to)), this.#x.value(Math.max(from, to))]);
    }
    this.#redraw(false);
  }

  #leave() {
    this.#drag = this.#cursor = null;
    this.#redraw(false);
  }

  /**
   * Return the x of the point that is nearest to an x, of any curve.
   * @param {number} x
   */
  #nearest(x) {
    let nearest = x;
    let distance = Infinity;
    for (const { points } of this.#shown) {
      const index = indexAt(points, x);
      for (const point of points.slice(Math.max(0, index), index + 2)) {
        if (Math.abs(point[0] - x) >= distance) continue;
        [nearest, distance] = [point[0], Math.abs(point[0] - x)];
      }
    }
    return nearest;
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { low, high } = this.#x;
    const at = this.#cursor ?? high;
    const points = this.#shown.reduce((most, each) => (each.points.length > most.length ? each.points : most), NONE);
    /** @param {number} steps */
    const move = (steps) => {
      if (!points.length) return;
      const index = Math.min(points.length - 1, Math.max(0, indexAt(points, at) + steps));
      this.#cursor = Math.min(high, Math.max(low, points[index][0]));
    };
    /** @param {number} factor */
    const zoom = (factor) => {
      const [from, to] = [at - (at - low) * factor, at + (high - at) * factor];
      const [first, last] = this.#extent();
      this.#zoomTo(from <= first && to >= last ? null : [from, to]);
    };
    const page = Math.max(1, Math.round(points.length / 10));
    /** @type {Record<string, () => void>} */
    const actions = {
      ArrowLeft: () => move(-1),
      ArrowDown: () => move(-1),
      ArrowRight: () => move(1),
      ArrowUp: () => move(1),
      PageDown: () => move(-page),
      PageUp: () => move(page),
      Home: () => move(-points.length),
      End: () => move(points.length),
      "+": () => zoom(0.5),
      "-": () => zoom(2),
      Escape: () => this.#zoomTo(null),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
    this.#redraw(false);
  }
}

/** @type {import("./curve.js").Points} */
const NONE = [];
