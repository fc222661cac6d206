/** A dataset on its way to a job: what the check says, the plan, and the start. */

import * as address from "./address.js";
import { get, post, remove } from "./api.js";
import { datasetCheck } from "./dataset_check.js";
import { button, element, replace } from "./dom.js";
import { size } from "./format.js";
import { back } from "./job_events.js";
import { jobForm } from "./job_form.js";
import { jobPlan } from "./job_plan.js";
import { notifyError } from "./notice.js";

const JOBS = "v1/fine_tuning/jobs";

/** @typedef {{id: string, filename: string, bytes: number, created_at: number}} FileRecord */

/**
 * Return the panel of an uploaded file.
 * @param {string} id the file's
 * @returns {import("./train.js").Panel}
 */
export function datasetPanel(id) {
  const stopping = new AbortController();
  const { signal } = stopping;
  const title = element("h1", { class: "text" }, "Dataset");
  const content = element("div", { class: "stack" }, element("p", { role: "status" }, "Checking…"));
  const path = `v1/files/${encodeURIComponent(id)}`;
  const discard = async () => {
    try {
      await remove(path);
      location.hash = address.link("train", {});
    } catch (error) {
      notifyError(error, "The file cannot be deleted");
    }
  };
  const panel = element(
    "section",
    { class: "stack" },
    element(
      "div",
      { class: "row spread" },
      title,
      element(
        "span",
        { class: "row" },
        element("a", { href: address.link("train", {}) }, "All files and jobs"),
        button("Delete this file", discard, { class: "danger" }),
      ),
    ),
    content,
  );
  const handle = { element: panel, failed: false, stop: () => stopping.abort() };
  open().catch((error) => {
    handle.failed = true;
    if (!signal.aborted) replace(content, element("p", { class: "error text", role: "alert" }, error.message));
  });

  async function open() {
    const [file, { data: files }] = await Promise.all([
      get(path, { signal }),
      get("v1/files?purpose=fine-tune", { signal }),
    ]);
    replace(title, `${file.filename} (${size(file.bytes)})`);
    /** @type {import("./dataset_check.js").FileCheck} */
    const check = await get(`${path}/check`, { signal });
    replace(content, datasetCheck(check));
    if (check.problem_count > 0) return;
    content.append(...jobOf(check, files.filter((/** @type {FileRecord} */ each) => each.id !== id)));
  }

  /**
   * @param {import("./dataset_check.js").FileCheck} check
   * @param {FileRecord[]} files
   */
  function jobOf(check, files) {
    const place = element("div");
    let asking = new AbortController();
    /** @param {any} body */
    const plan = async (body) => {
      asking.abort(); // the plan of settings that were changed
      const current = AbortSignal.any([signal, (asking = new AbortController()).signal]);
      try {
        const answer = await post("v1/fine_tuning/plan", body, { signal: current });
        form.refuse(null);
        form.showDefaults(answer);
        replace(place, jobPlan(answer));
      } catch (error) {
        if (current.aborted) return;
        refuse(error);
        if (/** @type {any} */ (error).status !== 0) return;
        await back(current);
        if (!current.aborted) plan(body);
      }
    };
    /** @param {any} body */
    const start = async (body) => {
      form.setBusy(true);
      try {
        const job = await post(JOBS, body);
        if (!signal.aborted) location.hash = address.link("train", { job: job.id });
      } catch (error) {
        refuse(error);
      } finally {
        form.setBusy(false);
      }
    };
    /** @param {unknown} error */
    const refuse = (error) => {
      form.refuse(/** @type {import("./api.js").ApiError} */ (error));
      replace(place);
    };
    const form = jobForm({ file: id, method: check.method, files, onChange: plan, onStart: start });
    plan(form.body());
    return [form.element, place];
  }

  return handle;
}
