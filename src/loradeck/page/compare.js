/** The view that asks models the same question, and shows their answers side by side. */

import * as address from "./address.js";
import { Column } from "./column.js";
import { Conversation } from "./conversation.js";
import { button, element, replace } from "./dom.js";
import { DEFAULTS, Sampling } from "./sampling.js";
import { session } from "./session.js";
import { LEGENDS } from "./tokens.js";

/** @typedef {import("./column.js").ColumnState} ColumnState */
/** @typedef {import("./column.js").Columns} Columns */
/** @typedef {import("./tokens.js").Colour} Colour */

/**
 * The state in the address.
 * @typedef {object} State
 * @property {string} [prompt]
 * @property {string} [system]
 * @property {{role: string, content: string}[]} [messages] the turns before, with the first column's answers
 * @property {ColumnState[]} [columns] with `answers` where they differ from the first column's
 * @property {import("./sampling.js").Settings} [sampling]
 * @property {"text" | "tokens"} [display]
 * @property {Colour} [colour] one besides `none` shows tokens
 */

const MAX_COLUMNS = 16; // what a server computes in one step, by default
const WRITE = 300; // milliseconds; a browser takes few changes of the address in a second

/** @type {[string, boolean, Colour][]} */
const DISPLAYS = [
  ["Text", false, "none"],
  ["Tokens", true, "none"],
  ["Tokens by probability", true, "probability"],
  ["Tokens against the base", true, "difference"],
];

/** @implements {Columns} */
class Compare {
  showsTokens = false;
  /** @type {Colour} */
  colour = "none";
  /** @type {Column[]} */
  #columns = [];
  /** @type {Set<Column>} */
  #updated = new Set();
  /** @type {Set<Column>} those that were asked since all were silent */
  #round = new Set();
  #frame = 0;
  #written = "";
  #isShown = false;
  #timer = 0;
  #grid = element("div", { class: "columns", role: "group", "aria-label": "Columns" });
  #legend = element("div", { class: "row legend" });
  #status = element("span", { role: "status", class: "muted" });
  #sampling = new Sampling(() => this.onChange());
  #conversation = new Conversation({
    onChange: () => this.onChange(),
    onAsk: () => this.#ask(),
    onEdit: (turn) => this.#edit(turn),
  });
  #stop = button("Stop all", () => this.#columns.forEach((column) => column.stop()), { disabled: true });
  #follow = button("Follow up", () => this.#followUp(), {
    disabled: true, title: "Keep these answers, and ask each column the next question",
  });
  #new = button("New conversation", () => this.#edit(0, true), { hidden: true });
  #display = element(
    "select",
    { onchange: () => this.#show(this.#display.selectedIndex) },
    ...DISPLAYS.map(([title]) => element("option", {}, title)),
  );

  constructor() {
    const ask = button("Ask all", () => this.#ask(), { class: "primary" });
    const add = button("Add a column", () => this.#add());
    this.element = element(
      "section",
      { class: "stack compare" },
      element("h1", { class: "hidden" }, "Compare"),
      element(
        "div",
        { class: "card stack" },
        this.#conversation.element,
        this.#sampling.element,
        element("div", { class: "row" }, ask, this.#stop, this.#follow, this.#new, this.#status),
      ),
      element("div", { class: "row" }, add, element("label", {}, "Show", this.#display), this.#legend),
      this.#grid,
    );
  }

  // ---- as the page's view

  /** @param {unknown} state */
  show(state) {
    this.#isShown = true;
    if (!this.#columns.length) this.#apply(isObject(state) ? state : {});
    else if (isObject(state) && JSON.stringify(state) !== this.#written) this.#apply(state);
    this.#write();
  }

  hide() {
    this.#isShown = false;
  }

  // ---- as the columns' view

  /** @param {Column} column */
  question(column) {
    const prompt = this.#conversation.prompt;
    if (!prompt.trim()) {
      this.#conversation.focus();
      this.#status.textContent = "Write a prompt first.";
      return null;
    }
    if (!this.#sampling.check()) return null;
    if (!this.#columns.some((each) => each.isReading)) this.#round.clear();
    this.#round.add(column);
    const [first] = this.#columns;
    const answers = this.#conversation.turns.map((_, index) => column.answers[index] ?? first.answers[index] ?? null);
    return { messages: this.#conversation.messages(answers, prompt), sampling: this.#sampling.settings };
  }

  onChange() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#write(), WRITE);
  }

  /** @param {Column} column */
  onUpdate(column) {
    this.#updated.add(column);
    this.#frame ||= requestAnimationFrame(() => this.#draw()); // all that arrives until then is drawn at once
  }

  /** @param {Column} column */
  onPin(column) {
    const isPinned = !column.isPinned;
    for (const other of this.#columns) other.setPinned(other === column && isPinned);
    if (isPinned) {
      this.#columns = [column, ...this.#columns.filter((other) => other !== column)];
      this.#grid.prepend(column.element);
      /** @type {HTMLElement | null} */ (column.element.querySelector("[aria-pressed]"))?.focus(); // moving took it
      this.#grid.scrollLeft = 0;
    }
    this.#changedColumns();
  }

  /** @param {Column} column */
  onRemove(column) {
    column.stop();
    const index = this.#columns.indexOf(column);
    this.#columns.splice(index, 1);
    column.element.remove();
    if (!this.#columns.length) this.#add();
    else this.#columns[Math.min(index, this.#columns.length - 1)].focus();
    this.#changedColumns();
  }

  // ---- what the user does

  #ask() {
    this.#status.textContent = "";
    for (const column of this.#columns) column.ask();
  }

  #add() {
    if (this.#columns.length >= MAX_COLUMNS) {
      this.#status.textContent = `There may be ${MAX_COLUMNS} columns.`;
      return;
    }
    const column = this.#append({});
    this.#changedColumns();
    column.focus();
  }

  #followUp() {
    const question = this.#columns.find((column) => column.answer?.text)?.answer?.question.messages.at(-1)?.content;
    if (question === undefined) return;
    for (const column of this.#columns) column.follow();
    this.#conversation.follow(question);
    this.#changedTurns();
  }

  /**
   * Put a question before back into the prompt; it and all after it are turns no more.
   * @param {number} turn
   * @param {boolean} [isNew] whether the prompt is to be empty
   */
  #edit(turn, isNew = false) {
    const question = isNew ? "" : this.#conversation.turns[turn];
    for (const column of this.#columns) column.cut(turn);
    this.#conversation.reset(this.#conversation.turns.slice(0, turn));
    this.#conversation.prompt = question;
    this.#changedTurns();
  }

  #changedTurns() {
    for (const column of this.#columns) column.drawBefore(this.#conversation.turns);
    this.#new.hidden = !this.#conversation.turns.length;
    this.#status.textContent = "";
    this.#conversation.focus();
    this.onChange();
  }

  #changedColumns() {
    for (const column of this.#columns) this.onUpdate(column); // another one may be the first
    this.onChange();
  }

  /** @param {number} index of DISPLAYS */
  #show(index) {
    [, this.showsTokens, this.colour] = DISPLAYS[index];
    this.#display.selectedIndex = index;
    const colour = this.colour;
    const marks = LEGENDS[colour].map((text, level) => element("span", { class: `badge ${colour}-${level}` }, text));
    replace(this.#legend, ...marks);
    for (const column of this.#columns) column.setDisplay();
    this.onChange();
  }

  // ---- drawing

  #draw() {
    this.#frame = 0;
    const [first] = this.#columns;
    const all = this.#updated.has(first);
    for (const column of this.#columns) {
      if (!all && !this.#updated.has(column)) continue;
      column.divergence.update(column.answer, column === first ? null : first.answer);
      column.draw(first);
    }
    this.#updated.clear();
    const reading = this.#columns.filter((column) => column.isReading).length;
    const wasReading = !this.#stop.disabled;
    if (reading && !wasReading) this.#status.textContent = "The columns answer…";
    if (!reading && wasReading) this.#status.textContent = this.#outcome;
    this.#stop.disabled = reading === 0;
    this.#follow.disabled = reading > 0 || !this.#columns.some((column) => column.answer?.text);
  }

  /** How the last answers have ended. */
  get #outcome() {
    const columns = this.#columns.filter((column) => this.#round.has(column));
    const finishes = columns.map((column) => column.answer?.finish);
    const failures = finishes.filter((finish) => finish === "failed").length;
    if (failures) return columns.length === 1 ? "The column failed." : `${failures} of ${columns.length} columns failed.`;
    if (finishes.includes("stopped")) return "Stopped.";
    if (columns.length === this.#columns.length) return "All columns have answered.";
    return columns.length === 1 ? "The column has answered." : `${columns.length} columns have answered.`;
  }

  /** @param {ColumnState} state */
  #append(state) {
    const column = new Column(state, this);
    this.#columns.push(column);
    this.#grid.append(column.element);
    return column;
  }

  // ---- the state

  #write() {
    clearTimeout(this.#timer);
    if (!this.#isShown) return;
    const state = this.#state;
    this.#written = JSON.stringify(state);
    address.write("compare", state);
  }

  /** @returns {State} */
  get #state() {
    const { prompt, system, turns } = this.#conversation;
    const [first] = this.#columns;
    const messages = turns.flatMap((question, index) => {
      const answer = first.answers[index];
      const user = { role: "user", content: question };
      return typeof answer === "string" ? [user, { role: "assistant", content: answer }] : [user];
    });
    const columns = this.#columns.map((column) => {
      const isSame = turns.every((_, index) => (column.answers[index] ?? first.answers[index]) === first.answers[index]);
      return isSame ? column.state : { ...column.state, answers: column.answers };
    });
    return {
      ...(prompt && { prompt }),
      ...(system && { system }),
      ...(messages.length && { messages }),
      columns,
      sampling: this.#sampling.settings,
      ...(this.showsTokens && { display: /** @type {const} */ ("tokens") }),
      ...(this.colour !== "none" && { colour: this.colour }),
    };
  }

  /**
   * Take a state, which anyone may have written.
   * @param {State} state
   */
  #apply(state) {
    for (const column of this.#columns.splice(0)) {
      column.stop();
      column.element.remove();
    }
    /** @type {ColumnState[]} */
    const states = (Array.isArray(state.columns) ? state.columns : []).filter(isObject).slice(0, MAX_COLUMNS);
    const { turns, answers } = turnsOf(Array.isArray(state.messages) ? state.messages.filter(isObject) : []);
    this.#conversation.system = typeof state.system === "string" ? state.system : "";
    this.#conversation.prompt = typeof state.prompt === "string" ? state.prompt : "";
    this.#conversation.reset(turns);
    this.#sampling.settings = isObject(state.sampling) ? state.sampling : DEFAULTS;
    for (const [index, column] of (states.length ? states : usualColumns()).entries()) {
      const previous = Array.isArray(column.answers) && index > 0 ? column.answers.slice(0, turns.length) : answers;
      this.#append({ ...column, blend: isObject(column.blend) ? column.blend : undefined, answers: previous });
    }
    const tokens = state.display === "tokens" || DISPLAYS.some(([, , colour]) => colour !== "none" && colour === state.colour);
    this.#show(tokens ? Math.max(1, DISPLAYS.findIndex(([, isTokens, colour]) => isTokens && colour === state.colour)) : 0);
    for (const column of this.#columns) column.drawBefore(turns);
    this.#new.hidden = !turns.length;
  }
}

/**
 * Return the base and the first two adapters.
 * @returns {ColumnState[]}
 */
function usualColumns() {
  return [{ model: "" }, ...session.adapters.slice(0, 2).map((model) => ({ model: model.id }))];
}

/**
 * Return the questions among messages, and the answer to each; null where there is none.
 * @param {{role?: unknown, content?: unknown}[]} messages
 */
function turnsOf(messages) {
  /** @type {string[]} */
  const turns = [];
  /** @type {(string | null)[]} */
  const answers = [];
  for (const { role, content } of messages) {
    if (typeof content !== "string") continue;
    if (role === "user") {
      turns.push(content);
      answers.push(null);
    } else if (role === "assistant" && turns.length) {
      answers[turns.length - 1] = content;
    }
  }
  return { turns, answers };
}

/**
 * @param {unknown} value
 * @returns {value is Record<string, any>}
 */
function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** @returns {import("./app.js").View} */
export function create() {
  return new Compare();
}
