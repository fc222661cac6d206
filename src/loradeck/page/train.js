/** The view that trains: datasets, their check and plan, and the jobs. */

import * as address from "./address.js";
import { datasetPanel } from "./dataset.js";
import { element, replace } from "./dom.js";
import { fileList } from "./file_list.js";
import { JobPanel } from "./job.js";
import { back } from "./job_events.js";
import { JobList } from "./job_list.js";
import { notifyError } from "./notice.js";

const PERIOD = 3000; // milliseconds between two looks at the jobs

/** @typedef {{job?: string, file?: string}} State what is open: a job, a dataset, or else the lists of both */
/**
 * What is open. `stop` ends what it does; it is opened anew if it has `failed` when it is shown again.
 * @typedef {{element: HTMLElement, failed: boolean, stop: () => void}} Panel
 */

/** @returns {import("./app.js").View} */
export function create() {
  const place = element("div");
  const files = fileList();
  const jobs = new JobList();
  const lists = element("div", { class: "stack" }, element("h1", {}, "Train"), files.element, jobs.element);
  /** @type {State} */
  let state = {};
  /** @type {Panel | null} */
  let panel = null;
  let isShown = false;

  /** @returns {Panel} */
  function open() {
    if (state.job) return new JobPanel(String(state.job));
    if (state.file) return datasetPanel(String(state.file));
    const stopping = new AbortController();
    refresh(stopping.signal);
    return { element: lists, failed: false, stop: () => stopping.abort() };
  }

  /** @param {AbortSignal} signal */
  async function refresh(signal) {
    let areFilesListed = false;
    let isRefused = false;
    while (!signal.aborted) {
      try {
        if (!areFilesListed) await files.refresh();
        areFilesListed = true;
        await jobs.refresh(signal);
        isRefused = false;
        await new Promise((resolve) => setTimeout(resolve, PERIOD));
      } catch (error) {
        if (signal.aborted) return;
        const { status } = /** @type {any} */ (error);
        areFilesListed = false;
        if (status === 0) {
          await back(signal);
          continue;
        }
        if (!isRefused) notifyError(error, "The jobs cannot be listed");
        isRefused = true;
        if (status < 500 && status !== 429) return; // it will not be answered otherwise later
        await new Promise((resolve) => setTimeout(resolve, PERIOD));
      }
    }
  }

  function close() {
    panel?.stop();
    panel = null;
  }

  return {
    element: place,
    show(next) {
      if (!next) {
        next = isShown ? {} : state;
        if (state.job || state.file) address.write("train", next);
      }
      isShown = true;
      if (JSON.stringify(next) !== JSON.stringify(state) || panel?.failed) close();
      state = next;
      if (panel) return; // as when the server is back
      panel = open();
      replace(place, panel.element);
    },
    hide() {
      isShown = false;
      if (!state.file) close(); // what was written about a dataset stays
    },
  };
}
