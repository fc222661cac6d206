/** All jobs of this key, and the curves of those that are checked, in one chart. */

import * as address from "./address.js";
import { get } from "./api.js";
import { lineChart } from "./chart.js";
import { button, element, replace } from "./dom.js";
import { JobEvents } from "./job_events.js";
import { jobProgress } from "./job_progress.js";
import { notifyError } from "./notice.js";
import { scrollArea } from "./scroll_area.js";

const PAGE = 50;
const PATH = `v1/fine_tuning/jobs?limit=${PAGE}`;
const CURVES = { loss: "loss", validation: "validation loss", rate: "learning rate" };

/** @typedef {import("./job_progress.js").Job} Job */

/** The list. It asks the server only when it is told to. */
export class JobList {
  /** @type {Map<string, Row>} by the job's id, the newest first */
  #rows = new Map();
  /** @type {Job[]} those beyond the first page */
  #older = [];

  constructor() {
    this.body = element("tbody");
    this.more = button("Older jobs", () => this.#loadOlder().catch(notifyError), { hidden: true });
    this.empty = element("p", { class: "empty" }, "No jobs yet. Drop a dataset to begin.");
    this.curve = element(
      "select",
      { id: "job-curve", onchange: () => this.#drawCurves() },
      ...Object.entries(CURVES).map(([value, text]) => element("option", { value }, text)),
    );
    this.chart = lineChart({ label: "Checked jobs", x: "step", y: "" });
    const label = element("label", { for: "job-curve" }, "Curve");
    this.curves = element("div", { class: "card" }, element("div", { class: "row" }, label, this.curve), this.chart.element);
    const heads = ["in the chart", "adapter", "progress", "from", "result"];
    const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
    this.table = scrollArea("Table of jobs", element("table", {}, element("thead", {}, head), this.body));
    this.element = element(
      "section",
      { class: "stack", "aria-label": "Jobs" },
      element("h2", {}, "Jobs"),
      this.empty,
      this.table,
      this.more,
      this.curves,
    );
  }

  /**
   * Ask for the newest jobs, and for what is new of the curves.
   * @param {AbortSignal} signal
   */
  async refresh(signal) {
    const page = await get(PATH, { signal });
    if (!this.#older.length) this.more.hidden = !page.has_more;
    const ids = new Set(page.data.map((/** @type {Job} */ job) => job.id));
    this.#older = this.#older.filter(({ id }) => !ids.has(id));
    this.#show([...page.data, ...this.#older]);
    await this.#loadCurves(signal);
  }

  async #loadOlder() {
    const page = await get(`${PATH}&after=${[...this.#rows.keys()].at(-1)}`);
    this.#older.push(...page.data);
    this.more.hidden = !page.has_more;
    this.#show([...[...this.#rows.values()].map(({ job }) => job), ...page.data]);
  }

  /** @param {Job[]} jobs */
  #show(jobs) {
    const rows = new Map(jobs.map((job) => [job.id, this.#rows.get(job.id) ?? new Row(job, () => this.#check())]));
    for (const [id, row] of this.#rows) if (!rows.has(id)) row.element.remove();
    this.#rows = rows;
    for (const [index, job] of jobs.entries()) {
      const row = /** @type {Row} */ (rows.get(job.id));
      row.update(job);
      const place = this.body.children[index] ?? null;
      if (place !== row.element) this.body.insertBefore(row.element, place); // only new ones, so that the focus stays
    }
    this.empty.hidden = jobs.length > 0;
    this.table.hidden = this.curves.hidden = jobs.length === 0;
  }

  get #checked() {
    return [...this.#rows.values()].filter(({ box }) => box.checked);
  }

  async #check() {
    this.#drawCurves();
    await this.#loadCurves().catch(notifyError);
  }

  /** @param {AbortSignal} [signal] */
  async #loadCurves(signal) {
    await Promise.all(this.#checked.map((row) => row.loadEvents(signal)));
    this.#drawCurves();
  }

  #drawCurves() {
    const curve = /** @type {keyof typeof CURVES} */ (this.curve.value);
    const rows = this.#checked;
    const names = rows.map(({ job }) => job.name);
    const series = rows.map(({ job, events }) => {
      const twice = names.indexOf(job.name) !== names.lastIndexOf(job.name);
      return { name: twice ? `${job.name} (${job.id.slice(-4)})` : job.name, points: events.curves[curve] };
    });
    this.chart.set(series);
  }
}

/** A job's row. */
class Row {
  /**
   * @param {Job} job
   * @param {() => void} onCheck called when it is checked, or no longer
   */
  constructor(job, onCheck) {
    this.job = job;
    this.events = new JobEvents(job.id);
    this.complete = false; // whether all its events are here, and no more will come
    this.box = element("input", {
      type: "checkbox",
      checked: job.status === "running",
      "aria-label": `Show ${job.name} in the chart`,
      onchange: onCheck,
    });
    this.progress = jobProgress();
    this.result = element("td", { class: "text" });
    this.element = element(
      "tr",
      {},
      element("td", {}, this.box),
      element("th", { scope: "row" }, element("a", { href: address.link("train", { job: job.id }) }, job.name)),
      element("td", {}, this.progress.element),
      element("td", { class: "text" }, job.model),
      this.result,
    );
  }

  /** @param {Job} job */
  update(job) {
    this.job = job;
    this.progress.update(job);
    const text = job.error?.message ?? job.fine_tuned_model ?? "";
    this.result.classList.toggle("error", job.error !== null);
    if (this.result.textContent !== text) replace(this.result, text);
  }

  /** @param {AbortSignal} [signal] */
  async loadEvents(signal) {
    if (this.complete) return;
    const ended = this.job.finished_at !== null;
    await this.events.load(signal);
    this.complete = ended;
  }
}
