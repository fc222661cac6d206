/** Where one answer parts from another, found while both grow. */

/** @typedef {{text: string, finish: string}} Text */

export class Divergence {
  /** @type {number | null} the offset of the first character that differs; null: none so far */
  at = null;
  #common = 0; // characters known to be the same
  /** @type {Text | null} */
  #own = null;
  /** @type {Text | null} */
  #other = null;

  /**
   * Look at what has arrived since the last look; return whether `at` has changed.
   * @param {Text | null} own
   * @param {Text | null} other
   */
  update(own, other) {
    const before = this.at;
    if (own !== this.#own || other !== this.#other) {
      [this.#own, this.#other, this.#common, this.at] = [own, other, 0, null];
    }
    if (own && other && own !== other && this.at === null) this.#look(own, other);
    return this.at !== before;
  }

  /**
   * @param {Text} own
   * @param {Text} other
   */
  #look(own, other) {
    const end = Math.min(own.text.length, other.text.length);
    while (this.#common < end && own.text[this.#common] === other.text[this.#common]) this.#common += 1;
    const [shorter, longer] = own.text.length < other.text.length ? [own, other] : [other, own];
    const ended = shorter.finish === "stop" && longer.text.length > end; // one says its end, where the other goes on
    if (this.#common < end || ended) this.at = this.#common;
  }
}
