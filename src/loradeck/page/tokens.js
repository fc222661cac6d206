/** An answer as its tokens: coloured, and each with its probability and the alternatives, by mouse and by keyboard. */

import { element, replace } from "./dom.js";
import { number } from "./format.js";

/** @typedef {"none" | "probability" | "difference"} Colour */

const PROBABILITIES = [0.05, 0.25, 0.5, 0.8]; // the bounds between five colours
const DIFFERENCES = [-2, -0.5, 0.5, 2]; // in nats: e⁰·⁵ is 1.6 times as likely

/** What the colours mean, the lowest first. */
export const LEGENDS = {
  none: [],
  probability: ["< 5 %", "5–25 %", "25–50 %", "50–80 %", "≥ 80 %"],
  difference: ["far less likely than by the base", "less", "about as likely", "more", "far more likely"],
};

/**
 * Return a token's class: `probability-0` to `-4`, `difference-0` to `-4`, or "" if it is unknown.
 * @param {Colour} colour
 * @param {import("./answer.js").Token} token
 */
export function shade(colour, { logprob, base }) {
  if (logprob === null || colour === "none" || (colour === "difference" && base === null)) return "";
  const value = colour === "probability" ? Math.exp(logprob) : logprob - Number(base);
  const bounds = colour === "probability" ? PROBABILITIES : DIFFERENCES;
  return `${colour}-${bounds.filter((bound) => value >= bound).length}`;
}

/** The tokens of one answer; arrow keys move among them. */
export class TokenView {
  /** @type {Colour} */
  #colour = "none";
  /** @type {import("./answer.js").Token[]} */
  #tokens = [];
  /** @type {HTMLSpanElement[]} */
  #spans = [];
  /** @type {HTMLSpanElement | null} */
  #marked = null;
  #current = -1;
  #details = element("div", { class: "token-details card", role: "status", popover: "manual" });
  #list = element("div", {
    class: "tokens text", tabIndex: 0, role: "group", "aria-label": "Tokens of the answer; arrow keys move among them",
    onpointerover: (/** @type {PointerEvent} */ event) => this.#hover(event),
    onfocus: () => this.#show(Math.max(0, this.#current)),
    onblur: () => this.#hide(),
    onkeydown: (/** @type {KeyboardEvent} */ event) => this.#move(event),
  });

  constructor() {
    this.element = element("div", { class: "token-view", onpointerleave: () => this.#hide() }, this.#list, this.#details);
  }

  get length() {
    return this.#tokens.length;
  }

  clear() {
    this.#hide();
    this.#tokens = [];
    this.#spans = [];
    this.#marked = null;
    this.#current = -1;
    this.#list.replaceChildren();
  }

  /** @param {import("./answer.js").Token[]} tokens */
  append(tokens) {
    for (const token of tokens) {
      const title = token.model && `From here on: ${token.model}`;
      const turn = token.model ? "turn " : "";
      const span = element("span", { class: turn + shade(this.#colour, token), title }, token.text);
      // A line of its own for each line of the text: the browser does not lay out again those that are complete.
      if (!this.#tokens.length || this.#tokens.at(-1)?.text.endsWith("\n")) this.#list.append(element("div"));
      this.#list.lastElementChild?.append(span);
      this.#tokens.push(token);
      this.#spans.push(span);
    }
  }

  /**
   * Colour all tokens, after `colour` or what is known of them has changed.
   * @param {Colour} colour
   */
  colour(colour) {
    this.#colour = colour;
    for (const [index, token] of this.#tokens.entries()) {
      const { classList } = this.#spans[index];
      classList.remove(...[...classList].filter((name) => /-\d$/.test(name)));
      const name = shade(colour, token);
      if (name) classList.add(name);
    }
  }

  /**
   * Mark the token with the character at an offset, or the last one; null marks none.
   * @param {number | null} offset
   */
  mark(offset) {
    const index = offset === null ? -1 : this.#tokens.findIndex((token) => token.end > offset);
    const marked = offset === null ? null : this.#spans.at(index);
    if (marked === this.#marked) return;
    this.#marked?.classList.remove("parts");
    this.#marked = marked ?? null;
    marked?.classList.add("parts");
  }

  /** @param {PointerEvent} event */
  #hover({ target }) {
    const index = target instanceof HTMLSpanElement ? this.#spans.indexOf(target) : -1;
    if (index >= 0) this.#show(index);
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const last = this.#tokens.length - 1;
    /** @type {Record<string, number>} */
    const places = { ArrowRight: this.#current + 1, ArrowLeft: this.#current - 1, Home: 0, End: last };
    if (event.key === "Escape") this.#hide();
    if (!(event.key in places)) return;
    event.preventDefault();
    this.#show(Math.min(Math.max(places[event.key], 0), last));
  }

  /** @param {number} index */
  #show(index) {
    const token = this.#tokens[index];
    if (!token) return;
    this.#hide();
    this.#current = index;
    const span = this.#spans[index];
    span.classList.add("current");
    replace(this.#details, ...describe(token));
    this.#details.showPopover();
    if (document.activeElement === this.#list) span.scrollIntoView({ block: "nearest" });
    const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { width, height } = this.#details.getBoundingClientRect();
    const fits = place.bottom + height < innerHeight || place.top < height;
    this.#details.style.left = `${Math.max(4, Math.min(place.left, innerWidth - width - 4))}px`;
    this.#details.style.top = `${fits ? place.bottom : place.top - height}px`;
  }

  #hide() {
    this.#spans[this.#current]?.classList.remove("current");
    if (this.#details.isConnected) this.#details.hidePopover();
  }
}

/**
 * @param {import("./answer.js").Token} token
 * @returns {Node[]}
 */
function describe({ text, logprob, top, base }) {
  if (logprob === null) return [element("p", {}, "The server gives no probabilities.")];
  const above = top.filter((one) => one.logprob > logprob).length;
  const rank = top.some((one) => one.text === text) || above < top.length ? `rank ${above + 1}` : `rank above ${top.length}`;
  const moved = base === null ? "–" : `${logprob >= base ? "+" : "−"}${number(Math.abs(logprob - base))} (base ${percent(base)})`;
  const rows = top.map((one) =>
    element(
      "tr",
      { class: one.text === text ? "chosen" : null },
      element("td", { class: "mono" }, visible(one.text)),
      element("td", { class: "number" }, percent(one.logprob)),
    ),
  );
  return [
    element("p", {}, element("b", { class: "mono" }, visible(text)), ` ${percent(logprob)}, ${rank}`),
    element("p", {}, `Log-probability against the base: ${moved}`),
    element(
      "table",
      { "aria-label": "Alternatives" },
      element("tbody", {}, ...rows),
    ),
  ];
}

/** @param {number} logprob */
function percent(logprob) {
  return `${number(100 * Math.exp(logprob))} %`;
}

/** @param {string} text */
function visible(text) {
  const escaped = JSON.stringify(text.replaceAll(" ", "␣")).slice(1, -1);
  return escaped.replace(/\\(["\\])/g, "$1") || "∅";
}
