/** A curve of a chart as an SVG path, with no more points than can be seen. */

/**
 * Points in the order of x. A y that is not finite, or not above 0 on a logarithmic axis, is a gap.
 * @typedef {[number, number][]} Points
 */

/**
 * Return the index of the last point that is not beyond `x`; -1 if there is none.
 * @param {Points} points
 * @param {number} x
 */
export function indexAt(points, x) {
  let [low, high] = [0, points.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/**
 * Return the path of the points between the axes' ends, and of one more on each side.
 *
 * Of each column of pixels it has the first, the lowest, the highest and the last point, so it looks as with all of them.
 * @param {Points} points
 * @param {import("./axis.js").Axis} x
 * @param {import("./axis.js").Axis} y
 */
export function curve(points, x, y) {
  const last = Math.min(points.length - 1, indexAt(points, x.high) + 1);
  let text = "";
  /** @type {{x: number, first: number, low: number, high: number, last: number} | null} */
  let column = null;
  let alone = true; // nothing is drawn from the point where the pen is
  let down = false;
  const flush = () => {
    if (!column) return;
    const { x: at, first, low, high, last } = column;
    const heights = [first, low, high, last].filter((height, index, all) => index === 0 || height !== all[index - 1]);
    for (const height of heights) {
      text += `${down ? "L" : "M"}${at} ${height}`;
      alone = !down;
      down = true;
    }
    column = null;
  };
  const lift = () => {
    flush();
    if (down && alone) text += "h0"; // a dot, with round ends
    down = false;
  };
  for (let index = Math.max(0, indexAt(points, x.low)); index <= last; index++) {
    const value = points[index][1];
    if (!Number.isFinite(value) || (y.log && value <= 0)) {
      lift();
      continue;
    }
    const at = Math.round(x.pixel(points[index][0]) * 2) / 2;
    const height = Math.round(y.pixel(value) * 10) / 10;
    if (column?.x !== at) {
      flush();
      column = { x: at, first: height, low: height, high: height, last: height };
    } else {
      column.low = Math.min(column.low, height);
      column.high = Math.max(column.high, height);
      column.last = height;
    }
  }
  lift();
  return text;
}
