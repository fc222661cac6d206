/** How far a job is: its status, its steps, and when it ends. */

import { element, replace } from "./dom.js";
import { ago, count, duration } from "./format.js";

/**
 * A job of `GET /v1/fine_tuning/jobs`.
 * @typedef {object} Job
 * @property {string} id
 * @property {string} name the adapter's
 * @property {string} model
 * @property {string} status
 * @property {number} created_at
 * @property {number | null} started_at
 * @property {number | null} finished_at
 * @property {number | null} estimated_finish
 * @property {number} steps
 * @property {number | null} total_steps
 * @property {number | null} trained_tokens
 * @property {{code: string, message: string} | null} error
 * @property {string | null} fine_tuned_model
 * @property {string[]} result_files
 * @property {string} training_file
 * @property {string | null} validation_file
 * @property {number} seed
 * @property {{type: "supervised" | "dpo", supervised?: any, dpo?: any}} method
 * @property {Record<string, any>} lora
 */

/** @type {Record<string, [string, string]>} each status as it is read, and its colour */
const STATUSES = {
  validating_files: ["reading files", "muted"],
  queued: ["waiting", "muted"],
  running: ["running", ""],
  paused: ["paused", "warn"],
  succeeded: ["succeeded", "good"],
  failed: ["failed", "error"],
  cancelled: ["cancelled", "muted"],
};

/**
 * Return whether nothing will change any more.
 * @param {Job} job
 */
export function hasEnded(job) {
  return ["succeeded", "failed", "cancelled"].includes(job.status);
}

/** Return an element that shows a job's progress, and a function that updates it. */
export function jobProgress() {
  const bar = element("progress", { max: 1, value: 0, "aria-label": "Steps" });
  const badge = element("span");
  const text = element("span", { class: "muted" });
  /** @param {Job} job */
  const update = (job) => {
    const [label, colour] = STATUSES[job.status] ?? [job.status, ""];
    badge.className = `badge ${colour}`;
    replace(badge, label);
    bar.hidden = hasEnded(job) || !job.total_steps;
    bar.max = job.total_steps ?? 1;
    bar.value = job.steps;
    const steps = job.total_steps && `${count(job.steps)} of ${count(job.total_steps)} steps`;
    replace(text, [steps, end(job)].filter(Boolean).join(", "));
  };
  return { element: element("span", { class: "row progress" }, badge, bar, text), update };
}

/** @param {Job} job */
function end({ status, finished_at, estimated_finish }) {
  if (finished_at) return ago(finished_at);
  if (status !== "running" || !estimated_finish) return "";
  return `${duration(Math.max(1, estimated_finish - Date.now() / 1000))} left`;
}
