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
  let down = false;
  let alone = true; // nothing is drawn yet from where the pen is
  let [column, first, low, high, final] = [NaN, 0, 0, 0, 0];
  /** @param {number} height */
  const draw = (height) => {
    text += `${down ? "L" : "M"}${column} ${height}`;
    alone = !down;
    down = true;
  };
  const flush = () => {
    if (Number.isNaN(column)) return;
    draw(first);
    if (low !== first) draw(low);
    if (high !== low) draw(high);
    if (final !== high) draw(final);
    column = NaN;
  };
  const lift = () => {
    flush();
    if (down && alone) text += "h0"; // a dot, as the ends of lines are round
    down = false;
  };
  for (let index = Math.max(0, indexAt(points, x.low)); index <= last; index++) {
    const [at, value] = points[index];
    if (!Number.isFinite(value) || (y.log && value <= 0)) {
      lift();
      continue;
    }
    const pixel = Math.round(x.pixel(at));
    const height = Math.round(y.pixel(value) * 2) / 2;
    if (pixel !== column) {
      flush();
      column = pixel;
      first = low = high = height;
    }
    if (height < low) low = height;
    if (height > high) high = height;
    final = height;
  }
  lift();
  return text;
}
