/** What happened to a job: its curves, samples and messages, from its events. */

import { connection, get, stream } from "./api.js";

const PAGE = 1000;
const RETRY = 1000; // milliseconds before a stream that was cut is opened again
const MESSAGES = 200; // kept; the server has all

/**
 * @typedef {{id: string, created_at: number, type: string, level: string, message: string,
 *   data: Record<string, any>}} JobEvent
 */
/** @typedef {{step: number, samples: {prompt: string, expected: string, answer: string}[]}} Samples */

/** The events of one job. They arrive in their order, each once, however often the server goes away. */
export class JobEvents {
  /** @type {Record<"loss" | "validation" | "rate", [number, number][]>} */
  curves = { loss: [], validation: [], rate: [] };
  /** @type {Samples[]} */
  samples = [];
  /** @type {JobEvent[]} those without metrics, the newest of them */
  messages = [];
  /** Tokens per second in the last step. */
  speed = NaN;
  /** The id of the newest event. */
  last = "";

  /** @param {string} job its id */
  constructor(job) {
    this.path = `v1/fine_tuning/jobs/${encodeURIComponent(job)}/events`;
  }

  /**
   * Ask for the events that are not here yet, and return whether there were any.
   * @param {AbortSignal} [signal]
   */
  async load(signal) {
    const newest = [];
    for (let after = "", more = true; more; ) {
      const page = await get(`${this.path}?limit=${PAGE}${after && `&after=${after}`}`, { signal });
      const unknown = page.data.filter((/** @type {JobEvent} */ event) => event.id > this.last);
      newest.push(...unknown);
      more = page.has_more && unknown.length === page.data.length;
      after = page.last_id;
    }
    for (const event of newest.reverse()) this.#add(event);
    return newest.length > 0;
  }

  /**
   * Follow the job until it has ended, or the server is about to; one that goes away is waited for.
   * @param {(event: JobEvent) => void} onEvent
   * @param {AbortSignal} signal
   * @throws {import("./api.js").ApiError} the server refuses
   */
  async follow(onEvent, signal) {
    for (;;) {
      try {
        const after = this.last && `&after=${this.last}`;
        const add = (/** @type {JobEvent} */ event) => {
          this.#add(event);
          onEvent(event);
        };
        return await stream(`${this.path}?stream=true${after}`, undefined, add, signal);
      } catch (error) {
        if (signal.aborted || /** @type {any} */ (error).status !== 0) throw error;
        await back(signal);
      }
    }
  }

  /** @param {JobEvent} event */
  #add(event) {
    if (event.id <= this.last) return; // another call has asked for it too
    const { step, train_loss, valid_loss, learning_rate, tokens_per_second, samples } = event.data;
    this.last = event.id;
    if (train_loss !== undefined) {
      const again = step <= (this.curves.loss.at(-1)?.[0] ?? -1); // from a checkpoint on, after a crash
      if (again) this.#forget(step);
      this.curves.loss.push([step, train_loss]);
    }
    if (learning_rate !== undefined) this.curves.rate.push([step, learning_rate]);
    if (valid_loss !== undefined) this.curves.validation.push([step, valid_loss]);
    if (tokens_per_second !== undefined) this.speed = tokens_per_second;
    if (samples) this.samples.push({ step, samples });
    if (event.type === "message") this.messages.push(event);
    if (this.messages.length > MESSAGES) this.messages.shift();
  }

  /**
   * Forget what was told from a step on.
   * @param {number} step
   */
  #forget(step) {
    for (const points of Object.values(this.curves)) {
      while (points.length && points[points.length - 1][0] >= step) points.pop();
    }
    this.samples = this.samples.filter((each) => each.step < step);
    this.messages = this.messages.filter(({ data }) => !(data.step >= step));
  }
}

/**
 * Wait a moment, and until the server answers.
 * @param {AbortSignal} signal
 */
export async function back(signal) {
  await new Promise((resolve) => setTimeout(resolve, RETRY));
  if (connection.online || signal.aborted) return;
  await new Promise((resolve) => {
    connection.addEventListener("change", resolve, { once: true, signal });
    signal.addEventListener("abort", resolve, { once: true });
  });
}
