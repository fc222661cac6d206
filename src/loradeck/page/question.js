/** What a model is asked, as the fields of a request: a chat, or plain text for a base without a chat template. */

/** @typedef {{role: "system" | "user" | "assistant", content: string}} Message */

/**
 * @typedef {object} Question
 * @property {Message[]} messages the last one is the user's
 * @property {import("./sampling.js").Settings} sampling
 */

const ALTERNATIVES = 5;
const MAX_TOKENS = 1_000_000; // as many as fit; a completion's own default is 16

/**
 * Return the fields of `POST /v1/chat/completions`.
 * @param {string} model
 * @param {Question} question
 */
export function chatFields(model, { messages, sampling }) {
  return { model, messages, ...sampling };
}

/**
 * Return the fields of `POST /v1/completions`: the messages' texts, which the model continues.
 * @param {string} model
 * @param {Question} question
 */
export function textFields(model, { messages, sampling }) {
  const prompt = messages.map((message) => message.content).join("\n\n");
  return { model, prompt, max_tokens: MAX_TOKENS, ...sampling };
}

/** The fields of a stream with everything that a column shows. */
const STREAM = { stream: true, stream_options: { include_usage: true }, return_token_ids: true };
export const CHAT_STREAM = { ...STREAM, logprobs: true, top_logprobs: ALTERNATIVES };
export const TEXT_STREAM = { ...STREAM, logprobs: ALTERNATIVES };
