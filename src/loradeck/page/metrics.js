/** The server's metrics, read every two seconds while the page is open, and the last hour of them. */

import { connection, getText } from "./api.js";
import { session } from "./session.js";

const PERIOD = 2000; // milliseconds between two samples
const KEPT = 3600; // seconds
const FIRST_TOKEN = "vllm:time_to_first_token_seconds";
const COUNTER = /_(total|bucket|count|sum)$/;
const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?$/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/**
 * One series, with a value for each of the history's times. A gauge's is NaN where there was none. A counter's is how
 * much it has grown since the first of them, so that a server's restart does not lower it.
 * @typedef {{name: string, labels: Record<string, string>, last: number, values: number[]}} Series
 */

/**
 * Call `onValue` for each value in Prometheus's text format, with the name and labels as they are written.
 * @param {string} text
 * @param {(series: string, value: number) => void} onValue
 */
export function readValues(text, onValue) {
  for (const line of text.split("\n")) {
    if (!line || line[0] === "#") continue;
    const at = line.lastIndexOf(" ");
    const value = line.slice(at + 1);
    onValue(line.slice(0, at), value === "+Inf" ? Infinity : Number(value));
  }
}

/**
 * Read `name{label="value",…}`.
 * @param {string} text
 * @returns {{name: string, labels: Record<string, string>}}
 */
export function readSeries(text) {
  const [, name, list] = LINE.exec(text) ?? [text, text, ""];
  /** @type {Record<string, string>} */
  const labels = Object.create(null);
  for (const [, label, value] of (list ?? "").matchAll(LABEL)) {
    labels[label] = value.replace(/\\(.)/g, (_, character) => (character === "n" ? "\n" : character));
  }
  return { name, labels };
}

/** The last hour. Listeners of `sample` hear of each new sample. */
export class History extends EventTarget {
  /** When the samples were taken, in seconds since 1970. @type {number[]} */
  times = [];
  /** By the text of their names and labels. @type {Map<string, Series>} */
  #series = new Map();
  /** By name. @type {Map<string, Series[]>} */
  #named = new Map();
  #running = false;

  /** Read the metrics from now on, if the key may. */
  async start() {
    if (this.#running || !session.rights?.control) return;
    this.#running = true;
    while (session.rights?.control) {
      if (connection.online) await getText("metrics").then((text) => this.add(text, Date.now() / 1000), () => {});
      await new Promise((resolve) => setTimeout(resolve, PERIOD));
    }
    this.#running = false;
  }

  /**
   * Add a sample.
   * @param {string} text in Prometheus's format
   * @param {number} time seconds since 1970
   */
  add(text, time) {
    const index = this.times.push(time) - 1;
    readValues(text, (key, value) => {
      const series = this.#series.get(key) ?? this.#open(key, index);
      if (!series) return;
      const before = series.values[index - 1] ?? 0;
      const growth = value >= series.last ? value - series.last : value;
      series.values[index] = !COUNTER.test(series.name) ? value : index ? before + growth : 0;
      series.last = value;
    });
    const excess = Math.max(0, this.times.findIndex((each) => each >= time - KEPT));
    this.times.splice(0, excess);
    for (const [key, series] of this.#series) {
      const isMissing = series.values.length <= index;
      if (isMissing) extend(series);
      series.values.splice(0, excess);
      if (isMissing && isOver(series)) this.#close(key, series);
    }
    this.dispatchEvent(new Event("sample"));
  }

  /**
   * Return the series of a name that have these labels, and maybe others.
   * @param {string} name
   * @param {Record<string, string>} [labels]
   */
  series(name, labels = {}) {
    const filters = Object.entries(labels);
    return (this.#named.get(name) ?? []).filter((each) => filters.every(([label, value]) => each.labels[label] === value));
  }

  /**
   * Return the newest value, summed over the series; NaN if there is none.
   * @param {string} name
   * @param {Record<string, string>} [labels]
   */
  value(name, labels) {
    const series = this.series(name, labels).filter((each) => !Number.isNaN(each.values.at(-1)));
    return series.length ? series.reduce((sum, each) => sum + each.last, 0) : NaN;
  }

  /**
   * Return a gauge at a sample, summed over the series; NaN if there is none.
   * @param {string} name
   * @param {number} index of the sample
   * @param {Record<string, string>} [labels]
   */
  valueAt(name, index, labels) {
    const values = this.series(name, labels).map((each) => each.values[index]).filter((value) => !Number.isNaN(value));
    return values.length ? values.reduce((sum, value) => sum + value, 0) : NaN;
  }

  /**
   * Return how much a counter grew per second; NaN if there was one sample only.
   * @param {string} name
   * @param {number} seconds of the span that ends at the sample
   * @param {Record<string, string>} [labels]
   * @param {number} [index] of the sample; the newest by default
   */
  rate(name, seconds, labels, index = this.times.length - 1) {
    const from = this.since(seconds, index);
    return from < index ? this.growth(name, from, index, labels) / (this.times[index] - this.times[from]) : NaN;
  }

  /**
   * Return how much a counter grew between two samples, summed over the series.
   * @param {string} name
   * @param {number} from
   * @param {number} to
   * @param {Record<string, string>} [labels]
   */
  growth(name, from, to, labels) {
    return this.series(name, labels).reduce((sum, each) => sum + each.values[to] - each.values[from], 0);
  }

  /**
   * Return the first sample of a span that ends at a sample; at least the one before it, if there is one.
   * @param {number} seconds
   * @param {number} [index] where the span ends
   */
  since(seconds, index = this.times.length - 1) {
    const start = this.times[index] - seconds;
    let from = Math.max(0, index - 1);
    while (from > 0 && this.times[from - 1] >= start) from -= 1;
    return from;
  }

  /**
   * Return a quantile of what a histogram counted between two samples, as Prometheus estimates it: evenly spread within
   * a bucket. NaN if it counted nothing.
   * @param {string} name
   * @param {number} share from 0 to 1
   * @param {number} from
   * @param {number} to
   */
  quantile(name, share, from, to) {
    /** @type {Map<number, number>} */
    const counts = new Map();
    for (const { labels, values } of this.series(`${name}_bucket`)) {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + values[to] - values[from]);
    }
    const rank = share * (counts.get(Infinity) ?? 0);
    if (!rank) return NaN;
    let [low, below] = [0, 0];
    for (const [bound, count] of [...counts].sort(([one], [other]) => one - other)) {
      if (count >= rank) return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (count - below);
      [low, below] = [bound, count];
    }
    return low;
  }

  /**
   * @param {string} key
   * @param {number} index
   */
  #open(key, index) {
    const { name, labels } = readSeries(key);
    if (!isKept(name)) return undefined;
    const before = COUNTER.test(name) ? 0 : NaN;
    const series = { name, labels, last: 0, values: /** @type {number[]} */ (Array(index).fill(before)) };
    this.#series.set(key, series);
    this.#named.set(name, [...(this.#named.get(name) ?? []), series]);
    return series;
  }

  /**
   * @param {string} key
   * @param {Series} series
   */
  #close(key, series) {
    this.#series.delete(key);
    this.#named.set(series.name, this.series(series.name).filter((each) => each !== series));
  }
}

/** @param {Series} series that the newest sample has not */
function extend(series) {
  const isCounter = COUNTER.test(series.name);
  series.values.push(isCounter ? /** @type {number} */ (series.values.at(-1)) : NaN);
  if (isCounter) series.last = 0; // it would start again from 0
}

/**
 * Return whether nothing of a series is left in the last hour.
 * @param {Series} series
 */
function isOver({ name, values }) {
  return COUNTER.test(name) ? values[0] === values.at(-1) : values.every(Number.isNaN);
}

/**
 * Most series are not drawn: of histograms, only the time to the first token; `…_info` has a new series at every change.
 * @param {string} name
 */
function isKept(name) {
  if (name.endsWith("_bucket")) return name === `${FIRST_TOKEN}_bucket`;
  return !name.endsWith("_created") && !name.endsWith("_info");
}

export const history = new History();
session.addEventListener("rights", () => history.start());
history.start();
