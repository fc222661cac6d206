/** Where one answer parts from another, found while both grow. */

/** @typedef {{text: string, finish: string}} Text */

export class Divergence {
  /** @type {number | null} the offset of the first character that differs; null: none so far */
  at = null;
  #common = 0; // characters known to be the same
  /** @type {Text | null} */
  #answer = null;
  /** @type {Text | null} */
  #other = null;

  /**
   * Look at what has arrived since the last look; return whether `at` has changed.
   * @param {Text | null} answer
   * @param {Text | null} other
   */
  update(answer, other) {
    const before = this.at;
    if (answer !== this.#answer || other !== this.#other) {
      [this.#answer, this.#other, this.#common, this.at] = [answer, other, 0, null];
    }
    if (answer && other && answer !== other && this.at === null) this.#look(answer, other);
    return this.at !== before;
  }

  /**
   * @param {Text} answer
   * @param {Text} other
   */
  #look(answer, other) {
    const end = Math.min(answer.text.length, other.text.length);
    while (this.#common < end && answer.text[this.#common] === other.text[this.#common]) this.#common += 1;
    const [shorter, longer] = answer.text.length < other.text.length ? [answer, other] : [other, answer];
    const ended = shorter.finish === "stop" && longer.text.length > end; // one says its end, where the other goes on
    if (this.#common < end || ended) this.at = this.#common;
  }
}
