/** The view that trains: datasets, their check and plan, and the jobs. */

import * as address from "./address.js";
import { connection } from "./api.js";
import { datasetPanel } from "./dataset.js";
import { element, replace } from "./dom.js";
import { fileList } from "./file_list.js";
import { JobPanel } from "./job.js";
import { JobList } from "./job_list.js";
import { notifyError } from "./notice.js";

const PERIOD = 3000; // milliseconds between two looks at the jobs

/** @typedef {{job?: string, file?: string}} State what is open: a job, a dataset, or else the lists of both */

/** @returns {import("./app.js").View} */
export function create() {
  const place = element("div");
  const files = fileList();
  const jobs = new JobList();
  const lists = element("div", { class: "stack" }, element("h1", {}, "Train"), files.element, jobs.element);
  /** @type {State} */
  let state = {};
  /** @type {() => void} */
  let stop = () => {};

  function showLists() {
    const stopping = new AbortController();
    const { signal } = stopping;
    const refresh = async () => {
      while (!signal.aborted) {
        if (connection.online) await jobs.refresh(signal);
        await new Promise((resolve) => setTimeout(resolve, PERIOD));
      }
    };
    const run = () => {
      refresh().catch((error) => {
        if (signal.aborted) return;
        if (error.status) notifyError(error, "The jobs cannot be listed");
        else connection.addEventListener("change", () => connection.online && run(), { once: true, signal });
      });
    };
    files.refresh().catch(notifyError);
    run();
    replace(place, lists);
    stop = () => stopping.abort();
  }

  /** @param {{element: HTMLElement, stop: () => void}} panel */
  function showPanel(panel) {
    replace(place, panel.element);
    stop = () => panel.stop();
  }

  return {
    element: place,
    show(next) {
      stop();
      if (next) state = next;
      else address.write("train", state);
      if (state.job) showPanel(new JobPanel(String(state.job)));
      else if (state.file) showPanel(datasetPanel(String(state.file)));
      else showLists();
    },
    hide() {
      stop();
    },
  };
}
