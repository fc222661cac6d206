/** One job: how far it is, its live curves, what it answers, its checkpoints, and what can be done with it. */

import * as address from "./address.js";
import { get, getText, post } from "./api.js";
import { lineChart } from "./chart.js";
import { checkpointTable, compareLink } from "./checkpoint_table.js";
import { button, element, replace } from "./dom.js";
import { ago, count } from "./format.js";
import { JobEvents, back } from "./job_events.js";
import { settingText } from "./job_plan.js";
import { hasEnded, jobProgress } from "./job_progress.js";
import { notifyError } from "./notice.js";
import { session } from "./session.js";

const PERIOD = 3000; // milliseconds between two looks at a job that has not ended

/** @typedef {import("./job_progress.js").Job} Job */

/** The panel of a job, which follows it until it is stopped. It implements Panel of train.js. */
export class JobPanel {
  failed = false;
  #stopping = new AbortController();
  #frame = 0;
  /** @type {Job | null} */
  #job = null;
  /** The newest message that is shown. */
  #message = "";

  /** @param {string} id */
  constructor(id) {
    this.path = `v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
    this.events = new JobEvents(id);
    this.title = element("h1", { class: "text" }, "Job");
    this.progress = jobProgress();
    this.speed = element("span", { class: "muted" });
    this.actions = element("span", { class: "row" });
    this.error = element("p", { class: "error text", role: "alert" });
    this.facts = element("p", { class: "muted text" });
    this.loss = lineChart({ label: "Loss", x: "step", y: "loss" });
    this.rate = lineChart({ label: "Learning rate", x: "step", y: "learning rate" });
    this.checkpoints = checkpointTable();
    this.samples = element("div", { class: "card stack", hidden: true });
    this.messages = element("ol", { class: "text" });
    this.files = element("div", { class: "row" });
    this.element = element(
      "section",
      { class: "stack" },
      element(
        "div",
        { class: "row spread" },
        this.title,
        element("a", { href: address.link("train", {}) }, "All files and jobs"),
      ),
      element("div", { class: "row spread" }, this.progress.element, this.speed, this.actions),
      this.error,
      this.facts,
      element(
        "div",
        { class: "job-charts" },
        ...[this.loss, this.rate].map((chart) => element("div", { class: "card" }, chart.element)),
      ),
      this.checkpoints.element,
      this.samples,
      this.files,
      element("details", {}, element("summary", {}, "What happened"), this.messages),
    );
    this.#run().catch((error) => {
      this.failed = true;
      if (!this.#stopping.signal.aborted) replace(this.error, error.message);
    });
  }

  stop() {
    this.#stopping.abort();
  }

  async #run() {
    const { signal } = this.#stopping;
    await this.#refresh();
    await this.events.load(signal);
    this.#redraw();
    await this.#loadCheckpoints();
    const timer = setInterval(() => this.#refresh().catch(() => {}), PERIOD); // the stream tells what is wrong
    try {
      while (!hasEnded(/** @type {Job} */ (this.#job))) {
        await this.events.follow((event) => this.#hear(event), signal);
        await this.#refresh();
        if (!hasEnded(/** @type {Job} */ (this.#job))) await back(signal); // the server ends
      }
    } finally {
      clearInterval(timer);
    }
    await this.#loadCheckpoints();
    if (this.#job?.status === "succeeded") await session.refreshModels();
  }

  /** @param {import("./job_events.js").JobEvent} event */
  #hear({ type, data }) {
    if (this.#job && data.train_loss !== undefined) this.#job.steps = data.step;
    this.#redraw();
    if (type !== "message") return;
    this.#refresh().catch(() => {});
    this.#loadCheckpoints().catch(() => {});
  }

  async #refresh() {
    this.#show(await get(this.path, { signal: this.#stopping.signal }));
  }

  async #loadCheckpoints() {
    const { data } = await get(`${this.path}/checkpoints?limit=100`, { signal: this.#stopping.signal });
    this.checkpoints.set(data);
  }

  /** @param {Job} job */
  #show(job) {
    const changed = this.#job?.status !== job.status;
    this.#job = job;
    replace(this.title, job.name);
    replace(this.error, job.error?.message);
    this.#redraw();
    if (!changed) return; // the buttons stay, and so does the focus
    const method = job.method.type;
    const settings = Object.entries({ ...job.method[method].hyperparameters, seed: job.seed, ...job.lora })
      .filter(([, value]) => value !== "auto")
      .map(([name, value]) => `${name} ${settingText(value)}`);
    replace(this.facts, [`${method} from ${job.model}`, `created ${ago(job.created_at)}`, ...settings].join(" · "));
    this.#drawActions(job);
    const files = job.result_files.map((id) =>
      button("Download the metrics (CSV)", () => download(id, `${job.name}.csv`).catch(notifyError)),
    );
    replace(this.files, ...files);
  }

  /** @param {Job} job */
  #drawActions(job) {
    /** @param {string} what */
    const change = (what) => () => post(`${this.path}/${what}`, {}).then((answer) => this.#show(answer), notifyError);
    const going = !hasEnded(job);
    replace(
      this.actions,
      job.status === "paused" && button("Resume", change("resume")),
      going && job.status !== "paused" && button("Pause", change("pause")),
      going && button("Cancel…", () => confirmCancel(job.name, change("cancel")), { class: "danger" }),
      job.fine_tuned_model && compareLink(job.fine_tuned_model, "Open in Compare"),
    );
  }

  #redraw() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const { curves, messages, samples, speed } = this.events;
    const series = [{ name: "loss", points: curves.loss, dashed: false }];
    if (curves.validation.length) series.push({ name: "validation loss", points: curves.validation, dashed: true });
    this.loss.set(series);
    this.rate.set([{ name: "learning rate", points: curves.rate }]);
    if (this.#job) this.progress.update(this.#job);
    replace(this.speed, this.#job?.status === "running" && speed > 0 && `${count(speed)} tokens/s`);
    const newest = messages.at(-1)?.id ?? "";
    if (newest === this.#message) return; // samples are messages, too
    this.#message = newest;
    replace(this.messages, ...messages.map(messageEntry));
    this.samples.hidden = samples.length === 0;
    replace(this.samples, element("h2", {}, "Samples at evaluations"), ...samples.map(sampleList).reverse());
    this.samples.querySelector("details")?.toggleAttribute("open", true);
  }
}

/** @param {import("./job_events.js").JobEvent} event */
function messageEntry({ created_at, level, message }) {
  const time = new Date(created_at * 1000).toLocaleTimeString("en-GB");
  return element("li", { class: level === "info" ? "" : level }, `${time} ${message}`);
}

/** @param {import("./job_events.js").Samples} evaluation */
function sampleList({ step, samples }) {
  const entries = samples.flatMap(({ prompt, expected, answer }) => [
    element("dt", { class: "text" }, prompt),
    element("dd", { class: "text" }, answer),
    element("dd", { class: "text muted" }, "expected: ", expected),
  ]);
  const summary = element("summary", {}, `Step ${count(step)}`);
  return element("details", {}, summary, element("dl", { class: "samples" }, ...entries));
}

/**
 * Ask whether a job shall really end without an adapter.
 * @param {string} name
 * @param {() => void} onConfirm
 */
function confirmCancel(name, onConfirm) {
  const confirm = () => {
    dialog.close();
    onConfirm();
  };
  const text = `${name} ends without an adapter and cannot go on. Its checkpoints can still be asked.`;
  const dialog = element(
    "dialog",
    { "aria-label": "Cancel the job", onclose: () => dialog.remove() },
    element("p", { class: "text" }, text),
    element(
      "div",
      { class: "row" },
      button("Cancel the job", confirm, { class: "danger" }),
      button("Let it go on", () => dialog.close()),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
}

/**
 * @param {string} id a file's
 * @param {string} name
 */
async function download(id, name) {
  const content = await getText(`v1/files/${id}/content`); // a link could not send the API key
  const url = URL.createObjectURL(new Blob([content], { type: "text/csv" }));
  element("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}
