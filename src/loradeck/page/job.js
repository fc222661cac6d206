/** One job: how far it is, its live curves, what it answers, its checkpoints, and what can be done with it. */

import * as address from "./address.js";
import { get, getText, post } from "./api.js";
import { lineChart } from "./chart.js";
import { button, element, replace } from "./dom.js";
import { ago, count, number } from "./format.js";
import { JobEvents, back } from "./job_events.js";
import { settingText } from "./job_plan.js";
import { hasEnded, jobProgress } from "./job_progress.js";
import { notifyError } from "./notice.js";
import { session } from "./session.js";

const PERIOD = 3000; // milliseconds between two looks at a job that has not ended

/** @typedef {import("./job_progress.js").Job} Job */

/** The panel of a job, which follows it until it is stopped. */
export class JobPanel {
  #stopping = new AbortController();
  #frame = 0;
  /** @type {Job | null} */
  #job = null;
  /** The models of the checkpoints that are shown. */
  #checkpoints = "";
  /** The newest message that is shown. */
  #message = "";

  /** @param {string} id */
  constructor(id) {
    this.path = `v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
    this.events = new JobEvents(id);
    this.title = element("h1", { class: "text" }, "Job");
    this.progress = jobProgress();
    this.actions = element("span", { class: "row" });
    this.error = element("p", { class: "error text", role: "alert" });
    this.facts = element("p", { class: "muted text" });
    this.speed = element("span", { class: "muted" });
    this.loss = lineChart({ label: "Loss", x: "step", y: "loss" });
    this.rate = lineChart({ label: "Learning rate", x: "step", y: "learning rate" });
    this.checkpoints = element("tbody");
    this.checkpointPart = part(
      "Checkpoints",
      element(
        "table",
        {},
        element("thead", {}, element("tr", {}, ...["step", "loss", "validation loss", ""].map((text) => element("th", { scope: "col" }, text)))),
        this.checkpoints,
      ),
    );
    this.samples = element("div", { class: "stack" });
    this.samplePart = part("Samples at evaluations", this.samples);
    this.messages = element("ol", { class: "text" });
    this.files = element("span", { class: "row" });
    this.element = element(
      "section",
      { class: "stack" },
      element("div", { class: "row spread" }, this.title, element("a", { href: address.link("train", {}) }, "All files and jobs")),
      element("div", { class: "row spread" }, this.progress.element, this.speed, this.actions),
      this.error,
      this.facts,
      element("div", { class: "charts" }, element("div", { class: "card" }, this.loss.element), element("div", { class: "card" }, this.rate.element)),
      this.checkpointPart,
      this.samplePart,
      this.files,
      element("details", {}, element("summary", {}, "What happened"), this.messages),
    );
    this.failed = false;
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
    signal.addEventListener("abort", () => clearInterval(timer));
    try {
      while (!hasEnded(/** @type {Job} */ (this.#job))) {
        await this.events.follow((event) => this.#hear(event), signal);
        await this.#refresh();
        if (!hasEnded(this.#job)) await back(signal); // the server ends
      }
    } finally {
      clearInterval(timer);
    }
    await this.#loadCheckpoints();
    if (this.#job?.status === "succeeded") await session.refreshModels();
  }

  /** @param {import("./job_events.js").JobEvent} event */
  #hear(event) {
    if (this.#job && event.data.train_loss !== undefined) this.#job.steps = event.data.step;
    this.#redraw();
    if (event.type !== "message") return;
    this.#refresh().catch(() => {});
    if (event.data.step !== undefined) this.#loadCheckpoints().catch(() => {});
  }

  async #refresh() {
    this.#show(await get(this.path, { signal: this.#stopping.signal }));
  }

  /** @param {Job} job */
  #show(job) {
    const before = this.#job;
    this.#job = job;
    replace(this.title, job.name);
    this.progress.update(job);
    replace(this.error, job.error?.message);
    if (before?.status === job.status) return; // the buttons stay, and so does the focus
    const { hyperparameters } = job.method[job.method.type];
    const settings = Object.entries({ ...hyperparameters, seed: job.seed, ...job.lora })
      .filter(([, value]) => value !== "auto")
      .map(([name, value]) => `${name} ${settingText(value)}`);
    const method = job.method.type === "dpo" ? "DPO" : "supervised";
    replace(this.facts, [`${method}, from ${job.model}`, `created ${ago(job.created_at)}`, ...settings].join(" · "));
    this.#drawActions(job);
    replace(this.files, ...job.result_files.map((id) => button("Download the metrics (CSV)", () => download(id, `${job.name}.csv`).catch(notifyError))));
  }

  /** @param {Job} job */
  #drawActions(job) {
    const change = (/** @type {string} */ what) => async () => {
      try {
        this.#show(await post(`${this.path}/${what}`, {}));
      } catch (error) {
        notifyError(error);
      }
    };
    const cancel = () => confirmCancel(job.name, change("cancel"));
    const adapter = job.fine_tuned_model;
    replace(
      this.actions,
      job.status === "paused" ? button("Resume", change("resume")) : !hasEnded(job) && button("Pause", change("pause")),
      !hasEnded(job) && button("Cancel…", cancel, { class: "danger" }),
      adapter && compareLink(adapter, "Open in Compare"),
    );
  }

  async #loadCheckpoints() {
    const { data } = await get(`${this.path}/checkpoints?limit=100`, { signal: this.#stopping.signal });
    const models = JSON.stringify(data.map((/** @type {any} */ each) => each.fine_tuned_model_checkpoint));
    if (models === this.#checkpoints) return;
    this.#checkpoints = models;
    this.checkpointPart.hidden = data.length === 0;
    const rows = data.map((/** @type {any} */ each) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, count(each.step_number)),
        ...[each.metrics.train_loss, each.metrics.valid_loss].map((loss) => element("td", {}, number(loss ?? NaN))),
        element("td", {}, compareLink(each.fine_tuned_model_checkpoint, "Open in Compare", `Open step ${each.step_number} in Compare`)),
      ),
    );
    replace(this.checkpoints, ...rows);
  }

  #redraw() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const { curves, messages, samples, speed } = this.events;
    const validation = { name: "validation loss", points: curves.validation, dashed: true };
    this.loss.set([{ name: "loss", points: curves.loss }, ...(curves.validation.length ? [validation] : [])]);
    this.rate.set([{ name: "learning rate", points: curves.rate }]);
    const running = this.#job?.status === "running" && speed > 0;
    replace(this.speed, running && `${count(speed)} tokens/s`);
    if (this.#job) this.progress.update(this.#job);
    const newest = messages.at(-1)?.id ?? "";
    if (newest !== this.#message) {
      this.#message = newest;
      replace(this.messages, ...messages.map((event) => element("li", { class: event.level === "error" ? "error" : null }, time(event.created_at), " ", event.message)));
    }
    this.samplePart.hidden = samples.length === 0;
    if (this.samples.childElementCount !== samples.length) replace(this.samples, ...samples.map(sampleList).reverse());
  }
}

/**
 * @param {import("./job_events.js").Samples} evaluation
 */
function sampleList({ step, samples }) {
  return element(
    "details",
    { open: true },
    element("summary", {}, `Step ${count(step)}`),
    element(
      "dl",
      { class: "samples" },
      ...samples.flatMap(({ prompt, expected, answer }) => [
        element("dt", { class: "text" }, prompt),
        element("dd", { class: "text" }, answer),
        element("dd", { class: "text muted" }, "expected: ", expected),
      ]),
    ),
  );
}

/**
 * Return a link that asks a model beside the base; nothing where this key's base does not generate.
 * @param {string} model
 * @param {string} text
 * @param {string} [label]
 */
function compareLink(model, text, label = text) {
  if (session.rights?.task !== "generate") return null;
  const columns = [{ model: session.base }, { model }];
  return element("a", { class: "button", href: address.link("compare", { columns }), "aria-label": label }, text);
}

/**
 * @param {string} title
 * @param {HTMLElement} content
 */
function part(title, content) {
  return element("section", { class: "card", hidden: true }, element("h2", {}, title), content);
}

/**
 * Ask whether a job shall really end without an adapter.
 * @param {string} name
 * @param {() => void} onConfirm
 */
function confirmCancel(name, onConfirm) {
  const end = (/** @type {boolean} */ confirmed) => {
    dialog.close();
    if (confirmed) onConfirm();
  };
  const dialog = element(
    "dialog",
    { "aria-label": "Cancel the job", onclose: () => dialog.remove() },
    element("p", { class: "text" }, `${name} ends without an adapter and cannot go on. Its checkpoints can still be asked.`),
    element("div", { class: "row" }, button("Cancel the job", () => end(true), { class: "danger" }), button("Let it go on", () => end(false))),
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

/** @param {number} seconds since 1970 */
function time(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}
