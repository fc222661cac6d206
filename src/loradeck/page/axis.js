/** An axis of a chart: from values to pixels and back, and its ticks. */

const STEPS = [1, 2, 5, 10];
const PADDING = 0.05; // of the range, so that no curve runs along the edge

/** A linear or logarithmic scale between two values at two pixels. */
export class Axis {
  /**
   * @param {number} low the value at the pixel `start`; above 0 if `log`
   * @param {number} high the value at the pixel `end`, above `low`
   * @param {number} start
   * @param {number} end
   * @param {boolean} [log]
   */
  constructor(low, high, start, end, log = false) {
    this.low = low;
    this.high = high;
    this.log = log;
    this.start = start;
    this.from = log ? Math.log10(low) : low;
    this.perValue = (end - start) / ((log ? Math.log10(high) : high) - this.from);
  }

  /**
   * Return an axis with some room around the values that it must show.
   * @param {number} low
   * @param {number} high Infinity and -Infinity: nothing to show
   * @param {number} start
   * @param {number} end
   * @param {boolean} log
   */
  static around(low, high, start, end, log) {
    if (low > high) [low, high] = log ? [0.1, 1] : [0, 1];
    if (log) {
      const factor = low === high ? 2 : (high / low) ** PADDING;
      return new Axis(low / factor, high * factor, start, end, true);
    }
    if (low === 0 && high === 0) return new Axis(-PADDING, 1, start, end); // most likely a quantity that is never negative
    const room = low === high ? Math.abs(low) / 2 || 1 : (high - low) * PADDING;
    return new Axis(low - room, high + room, start, end);
  }

  /** @param {number} value */
  pixel(value) {
    return this.start + ((this.log ? Math.log10(value) : value) - this.from) * this.perValue;
  }

  /** @param {number} pixel */
  value(pixel) {
    const value = this.from + (pixel - this.start) / this.perValue;
    return this.log ? 10 ** value : value;
  }

  /**
   * Return about `count` round values, and how they are written.
   * @param {number} count
   * @param {number} [distance] the smallest distance between two
   * @returns {{value: number, text: string}[]}
   */
  ticks(count, distance = 0) {
    if (this.log) {
      const powers = this.#powers(count);
      if (powers.length > 1) return powers.map((value) => ({ value, text: written(value, value) }));
    }
    const step = Math.max(distance, roundStep((this.high - this.low) / count));
    const ticks = [];
    for (let index = Math.ceil(this.low / step); index * step <= this.high; index++) {
      ticks.push({ value: index * step, text: written(index * step, step) });
    }
    return ticks;
  }

  /** @param {number} count */
  #powers(count) {
    const [first, last] = [Math.floor(Math.log10(this.low)), Math.ceil(Math.log10(this.high))];
    const decades = last - first;
    const digits = decades <= count / 2 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.round(decades / count));
    const values = [];
    for (let power = first; power <= last; power += every) {
      values.push(...digits.map((digit) => Number(`${digit}e${power}`)));
    }
    return values.filter((value) => value >= this.low && value <= this.high);
  }
}

/** @param {number} raw */
function roundStep(raw) {
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * /** @type {number} */ (STEPS.find((digit) => digit * power >= raw * 0.999));
}

/**
 * Return a value with as many digits as tell it from its neighbours.
 * @param {number} value
 * @param {number} step
 */
function written(value, step) {
  if (value === 0) return "0";
  const magnitude = Math.floor(Math.log10(Math.abs(value)));
  const digits = -Math.floor(Math.log10(step) + 1e-9);
  if (digits > 4 || magnitude > 6) return value.toExponential(Math.min(20, Math.max(0, digits + magnitude)));
  const places = Math.max(0, digits);
  return value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
}
