/** What is asked: a system text, the questions before, and the prompt. */

import { button, element, replace } from "./dom.js";

export class Conversation {
  /** @type {string[]} the questions before the prompt */
  turns = [];
  #list = element("ol", { class: "turns", "aria-label": "Questions before" });
  #system = element("textarea", { rows: 2, "aria-label": "System text", oninput: () => this.events.onChange() });
  #prompt = element("textarea", {
    rows: 3, id: "compare-prompt", placeholder: "Ask all columns…",
    oninput: () => this.events.onChange(),
    onkeydown: (/** @type {KeyboardEvent} */ event) => this.#key(event),
  });
  #more = element("details", {}, element("summary", {}, "System text"), this.#system);

  /**
   * @param {{onChange: () => void, onAsk: () => void, onEdit: (turn: number) => void}} events a text was changed; all
   *   columns are to be asked; a question before is to be asked again, and with it all after it are dropped
   */
  constructor(events) {
    this.events = events;
    this.element = element(
      "div",
      { class: "stack" },
      this.#more,
      this.#list,
      element("div", {}, element("label", { for: "compare-prompt" }, "Prompt"), this.#prompt),
    );
    this.#draw();
  }

  get prompt() {
    return this.#prompt.value;
  }

  set prompt(text) {
    this.#prompt.value = text;
  }

  get system() {
    return this.#system.value;
  }

  set system(text) {
    this.#system.value = text;
    this.#more.open ||= text !== "";
  }

  focus() {
    this.#prompt.focus();
  }

  /**
   * Put a question behind the others, and empty the prompt for the next one if that is not there yet.
   * @param {string} question
   */
  follow(question) {
    this.turns.push(question);
    if (this.prompt === question) this.prompt = "";
    this.#draw();
  }

  /** @param {string[]} turns */
  reset(turns) {
    this.turns = turns;
    this.#draw();
  }

  /**
   * Return the messages for a model whose answers to the questions before were these; null: it gave none.
   * @param {(string | null)[]} answers
   * @param {string} prompt
   */
  messages(answers, prompt) {
    /** @type {import("./question.js").Message[]} */
    const messages = [];
    if (this.system) messages.push({ role: "system", content: this.system });
    for (const [index, question] of this.turns.entries()) {
      messages.push({ role: "user", content: question });
      const answer = answers[index];
      if (typeof answer === "string") messages.push({ role: "assistant", content: answer });
    }
    messages.push({ role: "user", content: prompt });
    return messages;
  }

  #draw() {
    const items = this.turns.map((question, index) => {
      const label = `Edit question ${index + 1}, and ask again from there`;
      return element(
        "li",
        {},
        element("span", { class: "text" }, question),
        " ",
        button("Edit", () => this.events.onEdit(index), { class: "quiet", "aria-label": label, title: label }),
      );
    });
    replace(this.#list, ...items);
    this.#list.hidden = !items.length;
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.events.onAsk();
  }
}
