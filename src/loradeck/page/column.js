/** A column: a model, its answer as it arrives, and what can be done with both. */

import { Answer } from "./answer.js";
import { BlendEditor, formatBlend, parseBlend } from "./blend.js";
import { showCommands } from "./command_line.js";
import { Divergence } from "./divergence.js";
import { button, element, replace } from "./dom.js";
import { count, duration, number } from "./format.js";
import { MARK, MarkdownView } from "./markdown.js";
import { ModelChoice } from "./model_choice.js";
import { session } from "./session.js";
import { TokenView } from "./tokens.js";

/** @typedef {{model?: string, blend?: Record<string, number>, pinned?: boolean, answers?: (string | null)[]}} ColumnState */

/**
 * What a column asks of the view that it is in.
 * @typedef {object} Columns
 * @property {(column: Column) => import("./question.js").Question | null} question what to ask it; null: nothing, and it
 *   has been said why
 * @property {() => void} onChange its state has changed
 * @property {(column: Column) => void} onUpdate something has to be drawn
 * @property {(column: Column) => void} onPin
 * @property {(column: Column) => void} onRemove
 * @property {boolean} showsTokens instead of Markdown
 * @property {import("./tokens.js").Colour} colour of the tokens
 */

export class Column {
  /** @type {Answer | null} */
  answer = null;
  /** @type {(string | null)[]} its answers to the questions before */
  answers = [];
  divergence = new Divergence();
  isPinned = false;
  /** @type {import("./blend.js").Weights | null} */
  #weights = null;
  #model = "";
  /** @type {AbortController | null} */
  #reading = null;
  #goesOn = false; // whether what aborts the reading is a change of the blend
  #title = element("h2", { class: "hidden" });
  #choice = new ModelChoice("Model", (name) => this.#choose(name));
  #blend = element("div");
  #before = element("div");
  #numbers = element("p", { class: "muted numbers" });
  #state = element("p", { class: "state" });
  #markdown = new MarkdownView();
  #tokens = new TokenView();
  #ask = button("Ask", () => this.ask());
  #stop = button("Stop", () => this.stop(), { hidden: true });
  #pin = button("Pin", () => this.view.onPin(this), { "aria-pressed": "false" });
  #mix = button("Blend", () => this.#mixIn());
  #removal = button("×", () => this.view.onRemove(this), { class: "quiet" });

  /**
   * @param {ColumnState} state
   * @param {Columns} view
   */
  constructor(state, view) {
    this.view = view;
    this.answers = (state.answers ?? []).map((one) => (typeof one === "string" ? one : null));
    const buttons = element("div", { class: "row" }, this.#ask, this.#stop, this.#mix, this.#pin, button("Code", () => this.#showCode()));
    this.element = element(
      "section",
      { class: "card column" },
      this.#title,
      element("div", { class: "row head" }, this.#choice.element, this.#removal),
      this.#blend,
      buttons,
      this.#numbers,
      this.#before,
      element("div", { class: "answer" }),
      this.#state,
    );
    const weights = new Map(Object.entries(state.blend ?? {}).filter(([, weight]) => Number.isFinite(weight)));
    this.#set(weights.size ? weights : null, String(state.model ?? ""));
    this.setPinned(state.pinned === true);
    this.setDisplay();
  }

  /** @returns {string} what the requests' field `model` says */
  get model() {
    return this.#weights ? formatBlend(this.#weights) || session.base : this.#model || session.base;
  }

  get isReading() {
    return this.#reading !== null;
  }

  /** @returns {ColumnState} without the answers */
  get state() {
    const pinned = this.isPinned ? { pinned: true } : {};
    return this.#weights ? { blend: Object.fromEntries(this.#weights), ...pinned } : { model: this.#model, ...pinned };
  }

  /** @param {boolean} isPinned */
  setPinned(isPinned) {
    this.isPinned = isPinned;
    this.#pin.setAttribute("aria-pressed", String(isPinned));
    this.element.classList.toggle("pinned", isPinned);
  }

  focus() {
    this.#choice.focus();
  }

  // ---- asking

  /** Ask the view's question; what was answered before is gone. */
  async ask() {
    const question = this.view.question(this);
    if (!question) return;
    this.stop();
    const answer = new Answer(question);
    this.#show(answer);
    let isOver = false;
    while (!isOver) isOver = await this.#read(answer);
    if (answer === this.answer) {
      if (this.view.colour === "difference") await this.#compareWithBase();
      this.view.onUpdate(this);
    }
  }

  /** Stop the answer; what has arrived stays. */
  stop() {
    this.#goesOn = false;
    this.#reading?.abort();
  }

  /**
   * Read an answer to its end; return false if it is to go on with another blend.
   * @param {Answer} answer
   */
  async #read(answer) {
    const reading = new AbortController();
    this.#reading = reading;
    try {
      await answer.read(this.model, reading.signal, () => this.view.onUpdate(this));
    } catch (error) {
      const isStopped = /** @type {Error} */ (error).name === "AbortError";
      if (isStopped && this.#goesOn && this.#reading === reading) {
        this.#goesOn = false;
        return false;
      }
      answer.finish = isStopped ? "stopped" : "failed";
      if (!isStopped) answer.error = /** @type {Error} */ (error).message;
    }
    if (this.#reading === reading) this.#reading = null;
    this.view.onUpdate(this);
    return true;
  }

  /** Keep the answer as one to a question before. */
  follow() {
    this.answers.push(this.answer ? this.answer.text : null);
    this.#show(null);
  }

  /**
   * Forget the answers from a turn on.
   * @param {number} turn
   */
  cut(turn) {
    this.stop();
    this.answers.length = Math.min(this.answers.length, turn);
    this.#show(null);
  }

  // ---- the model

  /** @param {string} name */
  #choose(name) {
    this.#set(parseBlend(name), name);
    this.#changed();
  }

  #mixIn() {
    const name = this.model;
    this.#set(new Map(name === session.base ? [] : [[name, 1]]), "");
    this.#changed();
    this.#blend.querySelector("input")?.focus();
  }

  /**
   * @param {import("./blend.js").Weights | null} weights
   * @param {string} model
   */
  #set(weights, model) {
    this.#weights = weights;
    this.#model = weights ? "" : model;
    const editor = weights && new BlendEditor(weights, () => this.#named(), () => this.#changed());
    replace(this.#blend, editor?.element);
    this.#mix.hidden = weights !== null;
    this.#named();
  }

  /** The model is another one; an answer that is being read goes on with it from its next token. */
  #changed() {
    this.#named();
    this.view.onChange();
    if (this.#reading) {
      this.#goesOn = true;
      this.#reading.abort();
    } else {
      this.view.onUpdate(this);
    }
  }

  #named() {
    this.#choice.value = this.model;
    this.#title.textContent = this.model;
    this.element.setAttribute("aria-label", this.model);
    this.#removal.setAttribute("aria-label", `Remove ${this.model}`);
  }

  // ---- what is shown

  /** @param {Answer | null} answer */
  #show(answer) {
    this.answer = answer;
    this.#tokens.clear();
    this.view.onUpdate(this);
  }

  /** Show Markdown or tokens, in the view's colour. */
  setDisplay() {
    const place = /** @type {HTMLElement} */ (this.element.querySelector(".answer"));
    replace(place, this.view.showsTokens ? this.#tokens.element : this.#markdown.element);
    this.#tokens.colour(this.view.colour);
    this.view.onUpdate(this);
    if (this.view.colour === "difference" && this.answer?.finish) this.#compareWithBase();
  }

  async #compareWithBase() {
    const answer = /** @type {Answer} */ (this.answer);
    await answer.compareWithBase();
    if (answer !== this.answer) return;
    this.#tokens.colour(this.view.colour);
    this.view.onUpdate(this);
  }

  /**
   * Draw what has arrived.
   * @param {Column} first the column that the answer is compared with
   */
  draw(first) {
    const answer = this.answer;
    const at = this.divergence.at;
    if (this.view.showsTokens) {
      this.#tokens.append(answer?.tokens.slice(this.#tokens.length) ?? []);
      this.#tokens.mark(at);
    } else {
      this.#markdown.set(marked(answer?.text ?? "", at));
    }
    this.element.classList.toggle("reading", this.isReading);
    this.#ask.textContent = answer ? "Again" : "Ask";
    this.#ask.setAttribute("aria-label", `${answer ? "Ask again" : "Ask"}: ${this.model}`);
    if (this.#stop.hidden && this.isReading) this.#stop.hidden = false;
    if (!this.isReading && !this.#stop.hidden) {
      if (document.activeElement === this.#stop) this.#ask.focus();
      this.#stop.hidden = true;
    }
    this.#drawNumbers(first);
    this.#drawState();
  }

  /** @param {Column} first */
  #drawNumbers(first) {
    const answer = this.answer;
    if (!answer) {
      this.#numbers.textContent = "";
      return;
    }
    const at = this.divergence.at;
    const token = at === null ? -1 : answer.tokens.findIndex((one) => one.end > at);
    const parts = [
      `${count(answer.tokens.length)} token${answer.tokens.length === 1 ? "" : "s"}`,
      Number.isFinite(answer.rate) && `${number(answer.rate)} tokens/s`,
      Number.isFinite(answer.first) && `first after ${duration((answer.first - answer.started) / 1000)}`,
      answer.finish && `finish: ${answer.finish}`,
      at !== null && `parts from ${first.model} at token ${(token < 0 ? answer.tokens.length : token) + 1}`,
      this !== first && at === null && answer.finish && answer.text === first.answer?.text && `same as ${first.model}`,
    ];
    const text = parts.filter(Boolean).join(" · ");
    if (this.#numbers.textContent !== text) this.#numbers.textContent = text;
  }

  #drawState() {
    const answer = this.answer;
    const texts = [];
    if (answer?.finish === "failed") texts.push(`It failed${answer.text ? "; what has arrived is kept" : ""}.\n${answer.error}`);
    if (answer?.finish === "stopped") texts.push("Stopped; what has arrived is kept.");
    if (answer?.isPlain) texts.push("Without a chat template: it continues the prompt's text.");
    if (answer?.finish && answer.tokens.length && answer.model !== this.model) {
      texts.push(`The answer is of ${answer.model}; ask again for one of ${this.model}.`);
    }
    if (this.view.colour === "difference" && answer?.baseError) texts.push(`Against the base: – (${answer.baseError})`);
    this.#state.className = `state text ${answer?.finish === "failed" ? "error" : "muted"}`;
    const text = texts.join("\n");
    if (this.#state.textContent !== text) this.#state.textContent = text;
  }

  /**
   * Draw the answers to the questions before.
   * @param {string[]} questions
   */
  drawBefore(questions) {
    const turns = this.answers.slice(0, questions.length).map((answer, index) => {
      const view = new MarkdownView();
      view.set(marked(answer ?? "–", null));
      return element("details", { class: "before" }, element("summary", {}, questions[index]), view.element);
    });
    replace(this.#before, ...turns);
  }

  #showCode() {
    const question = this.view.question(this);
    if (question) showCommands(this.model, question, this.answer?.isPlain ?? false);
  }
}

/**
 * Return a text with the mark near an offset: before the next letter or digit, so that it is within no sign of Markdown.
 * @param {string} text
 * @param {number | null} offset
 */
function marked(text, offset) {
  const plain = text.replaceAll(MARK, "\uFFFD");
  if (offset === null) return plain;
  const pattern = /[\p{L}\p{N}]/gu;
  pattern.lastIndex = offset;
  let at = pattern.exec(plain)?.index ?? plain.length;
  const line = plain.lastIndexOf("\n", at - 1) + 1;
  const number = /^\s*\d+[.)]\s+/.exec(plain.slice(line));
  if (number && at < line + number[0].length) at = Math.min(plain.length, line + number[0].length);
  return plain.slice(0, at) + MARK + plain.slice(at);
}
