/** One answer: what has arrived of it, token by token, how fast, and how it ended. */

import { ApiError, get, post, stream } from "./api.js";
import { CHAT_STREAM, TEXT_STREAM, chatFields, textFields } from "./question.js";
import { session } from "./session.js";

/**
 * @typedef {object} Token
 * @property {string} text its own; a part of a character is written as bytes
 * @property {number} start the offset in the answer's text before it
 * @property {number} end the offset after it
 * @property {number | null} logprob null: the server gave none
 * @property {{text: string, logprob: number}[]} top the likeliest tokens at its place, the likeliest first
 * @property {number | null} base the log-probability that the base gives it; null: unknown
 * @property {string} [model] on the first token after the blend was changed: the new one
 */

/** Models that have no chat template, as this tab has learned. */
const plainModels = new Set();

export class Answer {
  text = "";
  /** @type {Token[]} */
  tokens = [];
  /** "" while it goes on; `stop` and `length` are the server's; `stopped` by the user; `failed` */
  finish = "";
  error = "";
  /** Why the base's log-probabilities are unknown, if they are. */
  baseError = "";
  /** Whether the prompt was continued as plain text. */
  isPlain = false;
  /** The model that answers now. */
  model = "";
  started = performance.now();
  first = NaN; // when the first token came, in the same milliseconds
  last = NaN;
  /** @type {number[]} */
  #ids = [];
  /** @type {number[] | null} */
  #promptIds = null;
  /** @type {Promise<void> | null} */
  #comparison = null;
  /** @type {string | undefined} the model whose next token is its first in this answer */
  #changed;

  /** @param {import("./question.js").Question} question */
  constructor(question) {
    this.question = question;
  }

  /** Tokens per second since the first one; NaN before the second. */
  get rate() {
    return this.tokens.length > 1 ? ((this.tokens.length - 1) * 1000) / (this.last - this.first) : NaN;
  }

  /**
   * Let a model answer, or go on with what another one has begun.
   * @param {string} model
   * @param {AbortSignal} signal
   * @param {() => void} onChange called when something has arrived
   * @returns {Promise<void>}
   * @throws {ApiError | DOMException} the answer keeps what has arrived
   */
  async read(model, signal, onChange) {
    if (this.tokens.length && model !== this.model) this.#changed = model;
    this.model = model;
    const take = (/** @type {any} */ event) => {
      this.#take(event);
      onChange();
    };
    const { path, fields } = this.#request();
    if (fields.max_tokens === 0) {
      this.finish = "length";
      return;
    }
    try {
      await stream(path, fields, take, signal);
    } catch (error) {
      if (!(await this.#lacksTemplate(error))) throw error;
      plainModels.add(model);
      return this.read(model, signal, onChange);
    }
    this.finish ||= "stop";
  }

  /**
   * Ask the base for its log-probabilities of this answer's tokens; `baseError` says why there are none.
   * @returns {Promise<void>}
   */
  compareWithBase() {
    this.#comparison ??= this.#compareWithBase().catch((error) => {
      this.baseError = error.message;
      if (error.status === 0) this.#comparison = null; // the server is gone, and will be back
    });
    return this.#comparison;
  }

  async #compareWithBase() {
    if (!this.#promptIds || this.#ids.length !== this.tokens.length) throw new Error("The server gives no token ids.");
    const prompt = [...this.#promptIds, ...this.#ids];
    const fields = { model: session.base, prompt, echo: true, max_tokens: 0, logprobs: 1 };
    const { choices } = await post("v1/completions", fields);
    const logprobs = choices[0].logprobs.token_logprobs.slice(this.#promptIds.length);
    for (const [index, token] of this.tokens.entries()) token.base = logprobs[index] ?? null;
    this.baseError = "";
  }

  /** Return the request for the answer, or for the rest of it. */
  #request() {
    const { messages, sampling } = this.question;
    const done = this.tokens.length;
    const rest = { ...this.question, sampling: { ...sampling } };
    if (sampling.max_tokens !== undefined) rest.sampling.max_tokens = Math.max(0, sampling.max_tokens - done);
    if (done && this.#promptIds && this.#ids.length === done) {
      const prompt = [...this.#promptIds, ...this.#ids]; // exactly what has been read and written
      return { path: "v1/completions", fields: { ...textFields(this.model, rest), ...TEXT_STREAM, prompt } };
    }
    if (plainModels.has(this.model)) {
      this.isPlain = true;
      const fields = textFields(this.model, rest);
      return { path: "v1/completions", fields: { ...fields, ...TEXT_STREAM, prompt: fields.prompt + this.text } };
    }
    const fields = { ...chatFields(this.model, rest), ...CHAT_STREAM };
    if (done) {
      const begun = { role: "assistant", content: this.text };
      Object.assign(fields, {
        messages: [...messages, begun], add_generation_prompt: false, continue_final_message: true,
      });
    }
    return { path: "v1/chat/completions", fields };
  }

  /** @param {unknown} error */
  async #lacksTemplate(error) {
    const refused = error instanceof ApiError && error.status === 400 && error.param === "messages";
    if (!refused || plainModels.has(this.model)) return false;
    const info = await get(`tokenizer_info?model=${encodeURIComponent(this.model)}`);
    return info.chat_template === null;
  }

  /** @param {any} event of a stream */
  #take(event) {
    const [choice] = event.choices;
    this.#promptIds ??= event.prompt_token_ids ?? choice?.prompt_token_ids ?? null;
    if (!choice) return; // the usage
    const start = this.text.length;
    this.text += choice.delta?.content ?? choice.text ?? "";
    const place = { start, end: this.text.length, base: null };
    for (const token of tokensOf(choice)) {
      this.last = performance.now();
      if (!this.tokens.length) this.first = this.last;
      this.tokens.push({ ...token, ...place, model: this.#changed });
      this.#changed = undefined;
    }
    if (choice.token_ids) this.#ids.push(...choice.token_ids);
    if (choice.finish_reason) this.finish = choice.finish_reason;
  }
}

/**
 * Return the tokens of one event, of a chat or of a completion.
 * @param {any} choice
 * @returns {{text: string, logprob: number | null, top: {text: string, logprob: number}[]}[]}
 */
function tokensOf({ logprobs, delta, text }) {
  if (logprobs?.content) {
    return logprobs.content.map((/** @type {any} */ token) => ({
      text: token.token,
      logprob: token.logprob,
      top: sorted(token.top_logprobs.map((/** @type {any} */ top) => [top.token, top.logprob])),
    }));
  }
  if (logprobs?.tokens) {
    return logprobs.tokens.map((/** @type {string} */ token, /** @type {number} */ index) => ({
      text: token.replace(/^bytes:/, ""),
      logprob: logprobs.token_logprobs[index],
      top: sorted(Object.entries(logprobs.top_logprobs?.[index] ?? {})),
    }));
  }
  const written = delta?.content ?? text; // another server may give no log-probabilities
  return written ? [{ text: written, logprob: null, top: [] }] : [];
}

/** @param {[string, number][]} top */
function sorted(top) {
  const tokens = top.map(([text, logprob]) => ({ text: text.replace(/^bytes:/, ""), logprob }));
  return tokens.sort((one, other) => other.logprob - one.logprob);
}
